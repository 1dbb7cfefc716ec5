# SPDX-License-Identifier: Apache-2.0
"""One small epoch of converted networks in the trainers of others."""

from pathlib import Path
from typing import Any

import lightning
import monai.engines
import pytest
import torch
import torchvision
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastdense
from fastdense.fusion.base import FusedModule

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:fastdense"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Blobs(Dataset):
    """Noise that is brighter in one of two halves, and which."""

    def __init__(self) -> None:
        self.labels = torch.arange(24) % 2
        self.pictures = 0.3 * torch.randn(24, 3, 32, 32)
        for at, label in enumerate(self.labels.tolist()):
            self.pictures[at, :, :, 16 * label : 16 * label + 16] += 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pictures[at], "labels": self.labels[at]}


def net() -> nn.Module:
    made = fastdense.convert(torchvision.models.DenseNet(8, (2, 2), 16, num_classes=2))
    assert any(isinstance(module, FusedModule) for module in made.modules())
    return made


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    data = Blobs()
    return float((model.cpu().eval()(data.pictures).argmax(1) == data.labels).float().mean())


def is_fused(model: nn.Module) -> bool:
    """A trainer may copy and wrap a network; its blocks stay what they are."""
    return any(isinstance(module, FusedModule) for module in model.modules())


class WithLoss(nn.Module):
    """As networks of transformers: the loss and the logits in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.net(pixel_values)
        made = {"logits": logits}
        return made if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **made}


def test_trainer_of_transformers(tmp_path: Path) -> None:
    options = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=4,
        per_device_train_batch_size=6,
        learning_rate=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(WithLoss(), options, train_dataset=Blobs(), eval_dataset=Blobs())
    result = trainer.train()
    assert result.global_step == 16 and is_fused(trainer.model)
    assert accuracy(trainer.model.net) >= 0.9
    again = transformers.Trainer(WithLoss(), options, train_dataset=Blobs(), eval_dataset=Blobs())
    again.train(resume_from_checkpoint=True)
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: dict[str, Tensor], at: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["pixel_values"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning(tmp_path: Path) -> None:
    trainer = lightning.Trainer(
        max_epochs=10, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    module = Module()
    trainer.fit(module, DataLoader(Blobs(), 6))
    assert is_fused(module) and accuracy(module.net) >= 0.9
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    plain = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=2)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    plain.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    assert accuracy(plain) == accuracy(module.net)


def test_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    prepared = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 0.01), DataLoader(Blobs(), 3))
    model, optimizer, loader = prepared
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
    assert accuracy(accelerator.unwrap_model(model)) >= 0.9


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_supervised_trainer_of_monai() -> None:
    model = net()
    trainer = monai.engines.SupervisedTrainer(
        device="cpu",
        max_epochs=10,
        train_data_loader=DataLoader(Blobs(), 6),
        network=model,
        optimizer=torch.optim.Adam(model.parameters(), 0.01),
        loss_function=nn.CrossEntropyLoss(),
        prepare_batch=lambda batch, device, non_blocking, **_: (batch["pixel_values"], batch["labels"]),
    )
    trainer.run()
    assert trainer.state.iteration == 40 and is_fused(model)
    assert accuracy(model) >= 0.9
