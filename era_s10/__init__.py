"""Train, understand and teach image classification."""

__version__ = "0.1.0"

from importlib import import_module

_LAZY = {
    "CIFAR10": "datasets.cifar10",
    "CIFAR100": "datasets.more",
    "Digits": "datasets.digits",
    "Experiment": "backprop",
    "FashionMNIST": "datasets.more",
    "FastModel": "speed",
    "MNIST": "datasets.mnist",
    "Model": "model",
    "MyDataSet": "datasets.generic",
    "SVHN": "datasets.more",
    "make_config": "recipe",
    "set_seed": "utils",
}  # the module of each name, imported when the name is first used
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that `import era_s10` stays light."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
