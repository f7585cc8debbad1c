"""The named datasets, such as `CIFAR10` and `Digits`, and `MyDataSet`, the base class of your own."""

from .cifar10 import CIFAR10, CIFAR10HeldOut
from .digits import Digits
from .generic import MyDataSet
from .mnist import MNIST
from .more import CIFAR100, SVHN, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "SVHN",
    "CIFAR10HeldOut",
    "Digits",
    "FashionMNIST",
    "MyDataSet",
]
