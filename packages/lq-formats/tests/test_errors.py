import inspect

import lq_formats
import pytest
from lq_formats import LQError, MissingPackageError, NoKernelError, errors

BUILTIN = {
    "CompileError": RuntimeError,
    "DTypeError": TypeError,
    "DeviceError": RuntimeError,
    "FormatError": ValueError,
    "GroupSizeError": ValueError,
    "LaunchError": RuntimeError,
    "MissingPackageError": ImportError,
    "NoKernelError": RuntimeError,
    "NonFiniteError": ValueError,
    "OutOfRangeError": IndexError,
    "ShapeError": ValueError,
    "SizeOverflowError": OverflowError,
    "SpecError": ValueError,
    "StorageError": RuntimeError,
    "UnknownVersionError": ValueError,
    "UnsupportedError": NotImplementedError,
}


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_each_error_is_an_lq_error_and_the_builtin_one_expects(name):
    error = getattr(errors, name)
    assert issubclass(error, LQError)
    assert issubclass(error, BUILTIN[name])
    assert name in lq_formats.__all__


def test_the_table_above_is_complete():
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, LQError)}
    assert defined == {"LQError", *BUILTIN}


def test_missing_package_says_what_to_install():
    error = MissingPackageError("gemlite", "int4_packing_format='gemlite'", "pip install 'lq-torch[gemlite]'")
    assert "run: pip install 'lq-torch[gemlite]'" in str(error)
    assert (error.package, error.install) == ("gemlite", "pip install 'lq-torch[gemlite]'")


def test_no_kernel_lists_every_reason():
    error = NoKernelError("int4 m=1", [("triton-gemv", "no GPU"), ("aten-cpu", "float64")])
    assert "triton-gemv: no GPU" in str(error)
    assert "aten-cpu: float64" in str(error)
    assert error.reasons == (("triton-gemv", "no GPU"), ("aten-cpu", "float64"))
    assert "no kernel is registered" in str(NoKernelError("int4 m=1", []))
