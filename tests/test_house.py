"""The rooms of the package, and which way they may be entered."""

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sirius_ext"
# Of the lowest floor first; whoever stands on one may import what stands on it or below.
FLOORS = (
    ("config", "control_groups", "errors", "extras", "loading"),
    ("kernels",),
    ("models",),
    ("runtime",),
    ("decoding",),
    ("generation",),
    ("engine",),
    ("evaluation", "integrations", "serving"),
    ("cli",),
    ("__init__", "__main__"),
)


def name_of(file):
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def floor(module):
    (found,) = (index for index, rooms in enumerate(FLOORS) if module.split(".")[0] in rooms)
    return found


def imported(module, whole=True):
    """The package's modules that one imports; those inside of functions only if `whole`."""
    tree, found = ast.parse(MODULES[module].read_text()), set()
    is_package = MODULES[module].name == "__init__.py" and module != "__init__"
    folder = [] if module == "__init__" else module.split(".") if is_package else module.split(".")[:-1]
    nodes = ast.walk(tree) if whole else tree.body
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*folder[: len(folder) + 1 - node.level], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                names = (".".join([*base, alias.name]), ".".join(base))
                found |= {next((name for name in names if name in MODULES), "")}
    return found - {"", module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_downwards(module):
    for other in imported(module):
        assert floor(other) <= floor(module), f"{module} imports {other}, which stands above it"


def test_there_are_no_circles():
    """Not even between modules of one room."""
    done, on_the_way = set(), []

    def visit(module):
        assert module not in on_the_way, f"a circle: {' -> '.join([*on_the_way[on_the_way.index(module) :], module])}"
        if module in done:
            return
        on_the_way.append(module)
        for other in sorted(imported(module, whole=False)):
            visit(other)
        done.add(on_the_way.pop())

    for module in MODULES:
        visit(module)
    assert done == set(MODULES)


def test_the_graph_is_what_it_seems():
    assert imported("runtime.cuda") >= {"runtime.cache", "runtime.model", "kernels.dispatch", "models.weights"}
    assert "engine" in imported("__init__") and "generation.resolve" in imported("engine")


def test_the_extension_comes_after_torch():
    """Whose OpenMP threads it then shares."""
    found = set()
    for module, file in MODULES.items():
        names = [alias.name for node in ast.parse(file.read_text()).body if hasattr(node, "names") for alias in node.names]
        if "_C" in names:
            found.add(module)
            assert "torch" in names[: names.index("_C")], module
    assert found >= {"kernels.ops", "kernels.dispatch", "runtime.model"}


@pytest.mark.parametrize("name", ["sirius_ext", "sirius_ext.evaluation"])
def test_what_a_package_gives(name):
    """Also what it imports when that is first asked for."""
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for each in package.__all__:
        getattr(package, each)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'Nonsense'"):
        package.Nonsense  # noqa: B018 - asking is the point


def test_only_one_module_changes_transformers():
    for module, file in MODULES.items():
        assigned = [
            target
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "GenerationMixin"
        ]
        assert bool(assigned) == (module == "integrations.transformers"), module
