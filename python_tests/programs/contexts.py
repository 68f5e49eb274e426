"""Steps of a program in which requests differ: contexts in one another and in threads, adapters by row, banks of tasks."""

from __future__ import annotations

from programs.builder import Builder, Value
from programs.forwards import forward, forward_net, parameter, run_line

TASKS = 3  # places of a bank


def mixed(b: Builder) -> None:
    """Rows of one batch for several adapters that share their factors."""
    x = b.input_for(b.widths[0])
    if not b.shared or b.dropout or b.magnitude or len(x.shape) < 2 or not 0 < x.shape[0] < 9:
        return forward(b)
    names = names_of_rows(b, x.shape[0])
    b.line(f"if w.mixes(net, {names}):")
    b.indent += 1
    b.line(f"with w.mixed(net, {names}):")
    b.indent += 1
    forward_net(b, x=x)  # the batch that is there whether they can be mixed or not
    b.indent -= 2
    b.forget()


def bank(b: Builder) -> None:
    """A bank, or what becomes of its tasks."""
    if b.frozen or b.magnitude:  # rows with cores of their own have no magnitudes
        return
    b.forget()
    if b.tasks is None:
        b.tasks = set()
        layer = b.one_of(*b.layers)
        if b.chance(0.5):
            b.line(f"{layer.name}.scaling = {b.one_of(0.25, -2.0)}")
        b.line(f"w.bank(net, {TASKS})")
        add(b)
        return add(b)
    kind = b.one_of("add", "replace", "drop", "file")
    if not b.tasks or (kind == "add" and len(b.tasks) < TASKS):
        return add(b)
    task = b.one_of(*sorted(b.tasks))
    if kind == "drop":
        b.line(f"net.lotr_tasks.drop({task})")
        b.tasks.remove(task)
    elif kind == "file" and len(b.tasks) < TASKS:
        b.line(f"w.task_from_file(net, {task})")
        b.tasks.add(free(b))
    else:
        b.line(f"net.lotr_tasks.replace({task}, w.task(net, {b.seed()}, {b.dtype(b.adapter)}))")


def free(b: Builder) -> int:
    return min(set(range(TASKS)) - b.tasks)


def add(b: Builder) -> None:
    b.line(f"net.lotr_tasks.add(w.task(net, {b.seed()}, {b.dtype(b.adapter)}))")
    b.tasks.add(free(b))


def share(b: Builder) -> None:
    """Another adapter over the active one's factors, parked."""
    if b.shared or b.made_cores or b.frozen:
        return
    b.shared.append("two")
    b.line('if not w.may_refuse(lambda: w.add_adapter(net, "two", shared=True)):')
    b.line("    before = w.active")
    b.line('    w.set_adapter(net, "two")')
    b.line(f"    w.fill(net, {b.seed()}, {b.dtype()}, {b.dtype(b.adapter)})")
    b.line("    w.set_adapter(net, before)")
    b.forget()


def names_of_rows(b: Builder, rows: int) -> list[str | None]:
    """Not none alone: then the active adapter's cores are in the graph, of which no row is made."""
    return [b.one_of("default", *b.shared), *(b.one_of("default", *b.shared, None) for _ in range(rows - 1))]


def context(b: Builder, rows: int) -> tuple[str, str | None]:
    """The call that opens one, and what it mixes, None for nothing."""
    kinds = ["names"] * bool(b.shared) + ["tasks"] * bool(b.tasks) if not (b.dropout or b.magnitude) else []
    kind = b.one_of(*kinds, *kinds, "disabled")
    if kind == "disabled":
        return "w.disabled(net)", None
    if kind == "names":
        mix = str(names_of_rows(b, rows))
    else:
        mix = f"torch.tensor({[b.one_of(*sorted(b.tasks), -1) for _ in range(rows)]})"
    return f"w.mixed(net, {mix})", mix


def prepared(b: Builder, count: int) -> tuple[Value, list[str]]:
    """An input, and calls that open contexts for its rows, inside of an `if`."""
    if b.tasks is None and b.chance(0.5):
        bank(b)
    else:
        share(b)
    if b.net_sets:
        b.changed()
    rows = b.number(2, 4)
    x = b.input(b.widths[0], b.one_of((rows, 3), (rows,), (rows, 40)))
    calls, mixes = zip(*(context(b, rows) for _ in range(count)))
    b.line(f"if {' and '.join(f'w.mixes(net, {mix})' for mix in mixes if mix) or 'True'}:")
    b.indent += 1
    return x, list(calls)


def nested(b: Builder) -> None:
    """Contexts in one another, closed one after the other, by an exception, or in another order, and then backward."""
    x, (outer, inner) = prepared(b, 2)
    b.fresh.clear()
    how = b.one_of("alone", "inside", "failing", "crossed", *(() if b.net_sets else ("region",)))
    if how == "alone":
        b.line(f"with {outer}:")
        b.indent += 1
        forward_net(b, x=x)
        b.indent -= 1
    elif how == "region":
        b.line("def region(t):")
        b.line(f"    with {inner}: return net(t, w)")
        b.line(f"with {outer}:")
        b.indent += 1
        forward_net(b, b.one_of("w.checkpoint(region, {0})", "w.checkpoint(region, {0}, reentrant=True)"), x)
        b.indent -= 1
    elif how == "crossed":
        b.line(f"outer, inner = {outer}, {inner}")
        b.line("outer.__enter__(), inner.__enter__()")
        forward_net(b, x=x)
        b.line("outer.__exit__(None, None, None)")
        forward_net(b, x=x)
        b.line("inner.__exit__(None, None, None)")
    else:
        b.line(f"with {outer}:")
        b.indent += 1
        if how == "failing":
            b.line("def fail():")
            b.line(f"    with {inner}: raise {b.one_of('Planned', 'PlannedInterrupt', 'PlannedClose')}")
            b.line("w.planned(fail)")
        else:
            b.line(f"with {inner}:")
            b.indent += 1
            forward_net(b, x=x)
            b.indent -= 1
        forward_net(b, x=x)
        b.indent -= 1
    if how != "alone":
        forward_net(b, x=x)
    b.line(f'w.backward("{b.name("b")}", w.loss({b.seed()}, {", ".join(y.name for y in b.fresh)}))')
    b.indent -= 1
    b.forget()


def in_threads(b: Builder) -> None:
    """The model in several threads at once, each in a context of its own."""
    if b.net_sets or b.net_swaps or b.dropout:  # one model for all: a thread would see what another one sets
        return
    b.forget()
    x, calls = prepared(b, b.number(2, 4))
    layer = b.one_of(*b.layers)
    wanted = f"{x.name}, {parameter(b, layer, 'A')}, {parameter(b, layer, 'core')}"
    for i, call in enumerate(calls):
        b.line(f"def work{i}():")
        b.indent += 1
        b.line(f"with {call}:")
        b.indent += 1
        b.line("w.meet()")
        run_line(b, f"ys = net({x.name}, w)")
        b.line("w.meet()")
        b.indent -= 1
        b.line(f"return [*ys, *gradients(w.loss({b.seed()}, *ys), [{wanted}], retain_graph=True)]")
        b.indent -= 1
    b.line(f"for found in w.threads({', '.join(f'work{i}' for i in range(len(calls)))}):")
    b.line('    for t in found: w.see("threads", t)')
    b.indent -= 1
    b.forget()


def threaded(b: Builder) -> None:
    """The same layers in several threads at once. Their graphs may share an earlier one, which no thread may free: PyTorch
    reads the tensors that a Python Function saved without a lock, and a thread that frees them meanwhile ends the process."""
    if b.dropout:
        return
    layer = b.one_of(*b.layers)
    x = b.input_for(layer.k)
    seed = b.seed()
    wanted = f"{x.name}, {layer.name}.core, {parameter(b, layer, 'A')}"
    b.line("def work():")
    b.indent += 1
    run_line(b, f"ys = {layer.name}({x.name}), {layer.name}({x.name} * 0.5)")
    b.line(f"return gradients(w.loss({seed}, *ys), [{wanted}], retain_graph=True)")
    b.indent -= 1
    b.line(f"for found in w.threads({', '.join(['work'] * b.number(2, 4))}):")
    b.line('    for t in found: w.see("threads", t)')
