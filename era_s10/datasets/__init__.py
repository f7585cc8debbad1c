"""The datasets: `CIFAR10`, `MNIST`, `Digits`, and `MyDataSet`, the base class of your own."""

from .cifar10 import CIFAR10, CIFAR10HeldOut
from .digits import Digits
from .generic import MyDataSet
from .mnist import MNIST

__all__ = ["CIFAR10", "MNIST", "CIFAR10HeldOut", "Digits", "MyDataSet"]
