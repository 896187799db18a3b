"""Inputs made by a generator network that is trained against the teacher: recovery without any data.

The generator G(z) is rewarded for inputs that the teacher is sure about, of all classes alike (Chen et al. 2019,
"Data-Free Learning of Student Networks", section 3.2: one-hot and information entropy losses), and that the student
does not answer as the teacher does (Micaelli, Storkey 2019, "Zero-shot Knowledge Transfer via Adversarial Belief
Matching", section 3.1). A bank of what it made before keeps the student from forgetting (Fang et al. 2021,
"Contrastive Model Inversion for Data-Free Knowledge Distillation", section 3.3). The statistics of batch normalisation
that DAFL and DeepInversion use are not there: models of the federation have none, since no example may depend on
another. Instead part of every batch is made from the schema, or drawn from statistics.

G is a small convolutional network for images (K, H, W), a perceptron for other inputs. Each coordinate of what it makes
lies between the smallest and largest that the schema's own synthetic inputs have there.

Legend: B inputs of a batch, Z latent numbers, D input shape without the batch, C classes.
"""

import math
from collections import deque

import torch
from torch import nn
from torch.nn import functional

from fedclaw.compress.record import GeneratorSettings
from fedclaw.errors import CompressionError
from fedclaw.learning.tasks.base import Task

SMALLEST_SIDE = 4
"""Of an image; smaller ones are made by the perceptron."""
MOST_DIVERGENCE = 5.0
"""Beyond which inputs that the student gets wrong earn the generator nothing more."""


class Images(nn.Module):
    """(B, Z) -> (B, K, H, W): from a quarter of the sides up, with group normalisation in one group."""

    def __init__(self, shape: tuple[int, int, int], latent: int, width: int) -> None:
        super().__init__()
        channels, height, across = shape
        self.sides = [(-(-height // part), -(-across // part)) for part in (4, 2, 1)]
        self.width = 4 * width
        self.first = nn.Linear(latent, self.width * math.prod(self.sides[0]))
        self.norms = nn.ModuleList(nn.GroupNorm(1, part * width) for part in (4, 2, 1))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(wide * width, narrow, 3, padding=1)
            for wide, narrow in ((4, 2 * width), (2, width), (1, channels))
        )

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Unbounded pixels."""
        maps: torch.Tensor = self.first(latent).view(-1, self.width, *self.sides[0])
        for number, (norm, convolution) in enumerate(zip(self.norms, self.convolutions, strict=True)):
            maps = functional.leaky_relu(norm(maps), 0.2)
            maps = functional.interpolate(maps, size=self.sides[number]) if number else maps
            maps = convolution(maps)
        return maps


class Perceptron(nn.Module):
    """(B, Z) -> (B, *D)."""

    def __init__(self, shape: tuple[int, ...], latent: int, width: int) -> None:
        super().__init__()
        self.shape = shape
        hidden = 4 * width
        self.layers = nn.Sequential(
            nn.Linear(latent, hidden),
            nn.LeakyReLU(0.2),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, math.prod(shape)),
        )

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Unbounded numbers."""
        made: torch.Tensor = self.layers(latent)
        return made.view(-1, *self.shape)


class Generator:
    """A generator in training beside a student; deterministic for a seed on one device."""

    def __init__(
        self, teacher: nn.Module, base: torch.Tensor, task: Task, settings: GeneratorSettings, seed: int
    ) -> None:
        """`base` (N, *D) are inputs made from the schema, on the device to work on."""
        self._teacher, self._task, self._settings = teacher, task, settings
        self._low, self._span = base.amin(dim=0), base.amax(dim=0) - base.amin(dim=0)
        self._random = torch.Generator().manual_seed(seed)
        shape = tuple(base.shape[1:])
        images = len(shape) == 3 and min(shape[1:]) >= SMALLEST_SIDE
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._network: nn.Module = (
                Images((shape[0], shape[1], shape[2]), settings.latent, settings.width)
                if images
                else Perceptron(shape, settings.latent, settings.width)
            ).to(base.device)
        self._parameters = list(self._network.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=settings.learning_rate, betas=(0.5, 0.999))
        self._bank: deque[torch.Tensor] = deque(maxlen=settings.bank)
        self._taken = 0

    def part_of(self, batch: int) -> int:
        """How many inputs of a batch are the generator's."""
        return round(self._settings.share * batch)

    def inputs(self, student: nn.Module, count: int) -> torch.Tensor:
        """`count` inputs for the student's next step, half of them new; every few calls the generator learns first."""
        if self._taken % self._settings.every == 0:
            self._learn(student, 4 * max(count, 1))
        self._taken += 1
        with torch.no_grad():
            new = self._make((count + 1) // 2)
        places = torch.randint(len(self._bank), (count // 2,), generator=self._random).tolist()
        return torch.cat([new, *(self._bank[place][None] for place in places)])

    def kept(self) -> torch.Tensor:
        """The bank, (N, *D): what it made, the last of it; nothing where its share of no batch was one input."""
        return torch.stack(list(self._bank)) if self._bank else self._low.new_zeros((0, *self._low.shape))

    def _make(self, count: int) -> torch.Tensor:
        latent = torch.randn(count, self._settings.latent, generator=self._random).to(self._low.device)
        made: torch.Tensor = self._low + self._span * torch.sigmoid(self._network(latent))
        return made

    def _learn(self, student: nn.Module, count: int) -> None:
        made = self._make(count)
        answers = self._teacher(made)
        loss = self._settings.confidence * self._unsure(answers)
        apart = self._apart(student(made), answers).clamp(max=MOST_DIVERGENCE)
        loss = loss - self._settings.adversarial * apart
        if not torch.isfinite(loss):
            raise CompressionError("the generator diverged: its loss is no longer finite; try a smaller learning rate")
        # Of the generator alone: the student's gradients are those of its own step.
        for parameter, gradient in zip(self._parameters, torch.autograd.grad(loss, self._parameters), strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._bank.extend(made.detach())

    def _apart(self, outputs: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """How far the student is from the teacher, a mean over the batch; gradients flow through both to the inputs.

        `Task.divergence` takes the teacher's outputs for constants, and here they are not.
        """
        if not self._task.labels:
            return functional.mse_loss(outputs, answers)
        student, teacher = (functional.log_softmax(logits, dim=1) for logits in (outputs, answers))
        return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def _unsure(self, answers: torch.Tensor) -> torch.Tensor:
        """How unsure the teacher is, and how unevenly the classes are dealt; 0 where there are no classes."""
        if not self._task.labels:
            return answers.new_zeros(())
        mean = functional.softmax(answers, dim=1).mean(dim=0)
        uneven = (mean * (mean + 1e-8).log()).sum() + math.log(answers.shape[1])
        return functional.cross_entropy(answers, answers.argmax(dim=1)) + self._settings.balance * uneven
