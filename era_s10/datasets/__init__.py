"""The data sets, in one place. Kept by hand; everything beside it is exported from the notebooks."""

from era_s10.datasets.cifar10 import CIFAR10, CIFAR10HeldOut
from era_s10.datasets.generic import MNIST, Digits, MyDataSet

__all__ = ["CIFAR10", "CIFAR10HeldOut", "MNIST", "Digits", "MyDataSet"]
