"""The package can be imported by the names of its modules, and no function hides one of them."""

import importlib
import pkgutil
import sys
from inspect import isfunction

import pytest

import kernels

MODULES = ["kernels", *(module.name for module in pkgutil.walk_packages(kernels.__path__, "kernels."))]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_what_its_dotted_name_leads_to(name, triton_device):
    importlib.import_module(name)
    top, *rest = name.split(".")
    found = sys.modules[top]
    for part in rest:
        found = vars(found)[part]
    assert found is sys.modules[name]


@pytest.mark.parametrize("package", sorted({name.rpartition(".")[0] for name in MODULES} - {""}))
def test_no_function_has_the_name_of_a_module_beside_it(package, triton_device):
    modules = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package}
    beside = [package, *(f"{package}.{name}" for name in modules)]
    functions = {
        name for module in beside for name, x in vars(importlib.import_module(module)).items() if isfunction(x)
    }
    assert modules and not modules & functions
