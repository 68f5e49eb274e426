"""The forms of the hardware's own instructions in the project's PTX occur in the programs that calibrate the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Kernels

from csrc.interpreter.build import CAPABILITIES
from csrc.interpreter.calibrate import build, forms
from csrc.simt.build import BuildError


@pytest.mark.slow
def test_each_form_is_in_a_program_or_listed(kernels: Callable[[int], Kernels]) -> None:
    try:
        build.cutlass()
    except BuildError as error:
        pytest.skip(str(error))
    ours = set().union(*(forms.forms(kernels(capability).library.texts()) for capability in CAPABILITIES))
    assert ours - set().union(*forms.of_programs().values()) == set(forms.ONLY_OURS)
