"""The model of the machine code: products of a warpgroup, which run while its warps go on, and what bulk copies add."""

from __future__ import annotations

import dataclasses

import pytest
from test_bench_static import code, row

from bench.projection import counts
from bench.projection.cards import CARDS
from bench.projection.compiled import Compiled
from bench.projection.issue import Latencies, Product, run
from bench.projection.model import bulk_in_flight, estimate, instance
from bench.projection.sass import parse

LATENCIES = Latencies(matrix=6.4, wgmma=4)
FROM_REGISTERS = "HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR16].tnspB, R24, gsb0"
FROM_SHARED = "HGMMA.64x64x16.F32 R152, gdesc[UR20].tnspB, RZ, !UPT"


def test_a_product_by_its_text():
    line = (
        f"        /*2f50*/                   {FROM_SHARED} ;  /* 0x40e00000149879f0 */\n"
        + " " * 80
        + "/* 0x000fe2000c7008ff */\n"
    )
    ((instruction,),) = parse(".text.k:\n" + line).values()
    assert instruction.opcode == "HGMMA.64x64x16.F32"
    # a quarter of A [64, 16] and of B [n, 16] in 2 bytes each
    assert Product.of(instruction) == Product(64, 512 + 512, False)
    assert Product.of(code(FROM_REGISTERS)[0]) == Product(128, 1024, True)


def test_listings_in_a_row_have_labels_of_their_own():
    branch = "        /*0000*/  BRA `(.L_x_1) ; /* 0x0000000000007947 */\n /* 0x002fea0003800000 */\n"
    end = "        /*{}*/  EXIT ; /* 0x000000000000794d */\n /* 0x000fea0003800000 */\n"
    near, far = (f".text.{name}:\n{branch}.L_x_1:\n{end.format(at)}" for name, at in (("near", "0010"), ("far", "0400")))
    assert {name: code[0].targets for name, code in parse(near + far).items()} == {"near": (0x10,), "far": (0x400,)}


def cycles(*parts: str, warpgroups: int = 1, arriving: float = 0.0) -> float:
    return run([code(*parts)] * 20, 4 * warpgroups, 1, LATENCIES, arriving=arriving).cycles


def test_products_take_the_matrix_units_or_the_shared_memory():
    """128 columns: 16 parts of 4 cycles a warp; of shared memory 4096 bytes a warpgroup, 32 cycles."""
    loop = (FROM_REGISTERS, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert cycles(*loop) == pytest.approx(64, abs=8)
    assert cycles(*loop, warpgroups=2) == pytest.approx(128, abs=8)
    assert cycles(*loop, arriving=4096) == pytest.approx(64, abs=8)  # 64 cycles of shared memory as well
    assert cycles(*loop, arriving=12288) == pytest.approx(128, abs=8)


def test_a_wait_leaves_so_many_groups_running():
    """Beside 64 cycles of other work of the warp, the products of the group before run on, or are waited for."""
    work = ("MOV R1, R2 | 16",) * 4
    assert cycles(*work, FROM_REGISTERS, "WARPGROUP.DEPBAR.LE gsb0, 0x0") == pytest.approx(128, abs=8)
    assert cycles(*work, FROM_REGISTERS, "WARPGROUP.DEPBAR.LE gsb0, 0x1") == pytest.approx(68, abs=8)


def test_the_vendor_s_peak_is_the_products():
    assert CARDS["h100"].latencies().wgmma == pytest.approx(4, rel=0.01)


def test_counts_know_each_card_by_its_multiprocessors():
    for card in CARDS.values():
        assert counts.DEVICES[card.multiprocessors] == (card.shared_bytes, card.early, card.architecture == "90a"), card


def test_the_instance_is_found_without_its_parameters():
    host, device = ("_ZN4lotr7kernels1kINS0_1TI6__halfEEEEv" + rest for rest in ("NS_4simt9TensorMapE", "14CUtensorMap_st"))
    assert instance(host) == instance(device) != instance(host.replace("6__half", "13__nv_bfloat16"))


def test_an_estimate_of_bulk_copies():
    """Two warpgroups of a block of twelve warps multiply; half of the ring of 96 KB is in flight; what they
    read of their cluster takes its time beside."""
    kernel = code(FROM_REGISTERS, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "BRA 0x0", "EXIT")
    made = {"_ZN4lotr7kernels6shrinkE": Compiled("_ZN4lotr7kernels6shrinkE", 168, 0, 0, kernel)}
    known = dataclasses.replace(row(), kernel="shrink_grad")
    machine = known.machine | {
        "warps": 12,
        "multiply": 8,
        "waits": 0,
        "copies": 0,
        "matrix": 132 * 8 * 100,
        "bulk_bytes": 132 * 100 * 12288,
        "late_loads": 16,
        "late_bytes": 16 * 8 * 512,
        "atomics": 1,
    }
    read = {"cluster": 8, "cluster_loads": 1, "cluster_bytes": 1000, "cluster_total": 132 * 131000, "sum_loads": 16}
    e, clustered = (estimate(dataclasses.replace(known, machine=machine | more), made, "h100") for more in ({}, read))
    assert e.in_flight == bulk_in_flight(dataclasses.replace(known, machine=machine)) == 49152
    assert (e.resident, e.resident_by) == (1, "registers")
    assert [(one.maps, one.chains) for one in (e, clustered)] == [(1, 0), (1, 1)]  # blocks of a cluster exchange k
    # 100 turns: (2 x 4096 + 12288) / 128 cycles of shared memory, 2 x 64 of the matrix units
    assert e.at().bound["issue"] == pytest.approx(100 * 160 / CARDS["h100"].clock, rel=0.06)
    assert (e.at().bound["cluster"], clustered.at().bound["cluster"]) == (0, pytest.approx(130000 / 13 / CARDS["h100"].clock))
    assert clustered.at().bound["issue"] > 1.05 * e.at().bound["issue"]  # the same path


@pytest.mark.parametrize("r, shared, stages", [(16, 72704, 7), (64, 115712, 7), (65, 222208, 9), (128, 222208, 9)])
def test_bytes_in_flight_of_shrink(r: int, shared: int, stages: int):
    """Of all stages but two a tile of x; a stage holds as many rows of A."""
    known = dataclasses.replace(row(), r=r)
    machine = known.machine | {"bulk_bytes": 1, "shared": shared}
    assert bulk_in_flight(dataclasses.replace(known, machine=machine)) == (stages - 2) * 8192
    assert bulk_in_flight(known) == 0
