"""The table of model families: complete, and without a name twice."""

import importlib
import pkgutil

from polyhead.convert import families
from polyhead.convert.family import Family


def family_values(module):
    values = getattr(module, "FAMILIES", None) or (module.FAMILY,)
    assert values
    assert all(isinstance(value, Family) for value in values)
    return values


def test_families_every_file_is_in_the_table():
    names = [module.name for module in pkgutil.iter_modules(families.__path__)]
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    declared = [value for module in modules for value in family_values(module)]
    assert len(declared) == len(families.FAMILIES)
    assert all(value in families.FAMILIES for value in declared)


def test_families_each_name_and_class_occurs_once():
    for field in ("names", "classes", "model_types"):
        values = [value for family in families.FAMILIES for value in getattr(family, field)]
        assert len(set(values)) == len(values) > 0
