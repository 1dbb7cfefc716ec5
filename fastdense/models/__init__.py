# SPDX-License-Identifier: Apache-2.0
"""Models by name: ``create("densenet121", num_classes=10)``; ``list()`` names them all."""

from fastdense.models.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_cifar,
)
from fastdense.models.dpn import DPN, dpn48b, dpn68, dpn68b, dpn92, dpn98, dpn107, dpn131
from fastdense.models.fc_densenet import FCDenseNet, fc_densenet56, fc_densenet67, fc_densenet103
from fastdense.models.fractalnet import FractalNet, fractalnet
from fastdense.models.highway import HighwayCifar, HighwayMlp, HighwayMnist, highway_cifar, highway_mlp, highway_mnist
from fastdense.models.hub import from_pretrained, push_to_hub, save_pretrained
from fastdense.models.key_mapping import load_densenet, torchvision_keys
from fastdense.models.registry import create, is_super_resolution, list, load_weights, memory_modes
from fastdense.models.resnet import ResNet, preresnet_cifar, resnet_cifar, stochastic_depth_cifar
from fastdense.models.resnet_in_resnet import ResNetInResNet, resnet_in_resnet
from fastdense.models.sr.base import SuperResolutionNet
from fastdense.models.sr.checkpoints import load_super_resolution, save_super_resolution
from fastdense.models.sr.drcn import DRCN, drcn
from fastdense.models.sr.edsr import EDSR, edsr, edsr_baseline
from fastdense.models.sr.rdn import RDN, rdn
from fastdense.models.sr.rrdbnet import RRDBNet, rrdbnet
from fastdense.models.sr.srcnn import SRCNN, srcnn
from fastdense.models.sr.srdensenet import SRDenseNet, srdensenet
from fastdense.models.sr.vdsr import VDSR, vdsr
from fastdense.models.weights import (
    DenseNet121_Weights,
    DenseNet161_Weights,
    DenseNet169_Weights,
    DenseNet201_Weights,
    PublishedWeights,
)

__all__ = [
    "DPN",
    "DRCN",
    "EDSR",
    "RDN",
    "SRCNN",
    "VDSR",
    "DenseNet",
    "DenseNet121_Weights",
    "DenseNet161_Weights",
    "DenseNet169_Weights",
    "DenseNet201_Weights",
    "FCDenseNet",
    "FractalNet",
    "HighwayCifar",
    "HighwayMlp",
    "HighwayMnist",
    "PublishedWeights",
    "RRDBNet",
    "ResNet",
    "ResNetInResNet",
    "SRDenseNet",
    "SuperResolutionNet",
    "create",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_cifar",
    "dpn48b",
    "dpn68",
    "dpn68b",
    "dpn92",
    "dpn98",
    "dpn107",
    "dpn131",
    "drcn",
    "edsr",
    "edsr_baseline",
    "fc_densenet56",
    "fc_densenet67",
    "fc_densenet103",
    "fractalnet",
    "from_pretrained",
    "highway_cifar",
    "highway_mlp",
    "highway_mnist",
    "is_super_resolution",
    "list",
    "load_densenet",
    "load_super_resolution",
    "load_weights",
    "memory_modes",
    "preresnet_cifar",
    "push_to_hub",
    "rdn",
    "resnet_cifar",
    "resnet_in_resnet",
    "rrdbnet",
    "save_pretrained",
    "save_super_resolution",
    "srcnn",
    "srdensenet",
    "stochastic_depth_cifar",
    "torchvision_keys",
    "vdsr",
]
