"""The definition of a supervised stage for its training processes: model, batches, loss, files."""

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.config import Config
from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.data.reading.tables import TokenRow
from rlhf_ray.data.rendering.tokens import pad_id
from rlhf_ray.disk import DAMAGE
from rlhf_ray.models import adapters, loading
from rlhf_ray.models.adapters import Model
from rlhf_ray.models.merging import verify_saved
from rlhf_ray.models.probes import probe_logits
from rlhf_ray.models.trainable import prepare_for_adapter, train_only
from rlhf_ray.observability.sinks import JsonlSink

TRAIN, HELD_OUT = "train", "held_out"
"""Names of the two tokenised data sets of a stage."""

HELD_OUT_SHARE = 0.05
"""Share of the rows that is drawn and held out where the data has no held-out set."""

HELD_OUT_LOSS = "held_out_loss"
"""Name under which `Training.measure` gives the loss of all held-out rows. The Trainer's own counts
rows twice that fill up the last batch of several processes."""

HELD_OUT_METRICS = (HELD_OUT_LOSS, "perplexity", "accuracy", "auc", "correlation")
"""What `Training.measure` may give."""

Counts = dict[str, int]
"""Rows kept, and rows dropped by reason."""


@dataclass(frozen=True)
class Training(ABC):
    """One supervised stage, picklable and with absolute paths; each stage has a subclass.

    Attributes:
        config: the run's.
        folder: the stage's folder; every training process must see it.
        base: folder or hub name of the model that is trained.
    """

    name: ClassVar[str]
    adapter_folder: ClassVar[str] = "model"
    """Where an adapter is saved, inside the stage's folder."""
    model_computes_loss: ClassVar[bool] = False
    """Train on the loss that the model returns, instead of that of `predict_rows`."""
    config: Config
    folder: Path
    base: str

    @property
    def settings(self) -> SupervisedConfig:
        """The stage's own config section."""
        return getattr(self.config, self.name)

    @property
    def all_weights(self) -> bool:
        """Whether all weights are trained: in fp32, computed and saved in ``model.dtype``."""
        return False

    @property
    def autocast(self) -> str | None:
        """``bf16`` or ``fp16``: compute in half precision over fp32 weights; None: as they are."""
        halves = {"bfloat16": "bf16", "float16": "fp16"}
        return halves.get(self.config.model.dtype) if self.all_weights else None

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's ZeRO stage; None: without DeepSpeed, as always inline, in one process."""
        return None if self.config.cluster.mode == "inline" else self.settings.zero_stage

    @property
    def model_settings(self) -> ModelConfig:
        """Settings with which the base is loaded."""
        settings = self.config.model
        return settings.model_copy(update={"dtype": "float32"}) if self.all_weights else settings

    @abstractmethod
    def load_model(self) -> Model:
        """Load the model; its trainable weights require gradients."""

    def ready(self, model: nn.Module) -> None:  # noqa: B027  (most stages need nothing)
        """Check and change the loaded model where it is trained, before its first pass."""

    @abstractmethod
    def collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Make one batch of rows of the tokenised data set."""

    @abstractmethod
    def predict_rows(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, a mean over its rows, and numbers of each row, `_B...`."""

    @abstractmethod
    def measure(self, rows: np.ndarray) -> dict[str, float]:
        """Compute some of `HELD_OUT_METRICS` from the numbers of all held-out rows, each once."""

    def partly_frozen(self, model: Model, *also_trained: str) -> Model:
        """Freeze what ``<stage>.unfreeze`` leaves out, but never the modules ``also_trained``."""
        prefixes = getattr(self.settings, "unfreeze", None)
        if prefixes is not None:
            train_only(model, [*prefixes, *also_trained], f"{self.name}.unfreeze")
        return model

    def with_adapter(
        self, model: Model, lora: LoraConfig, task: Literal["CAUSAL_LM", "SEQ_CLS"]
    ) -> PeftModel:
        """Freeze the model, which may be quantised, under a new LoRA adapter."""
        model = prepare_for_adapter(model, self.model_settings)
        seed = self.config.run.seed
        return adapters.attach(model, lora, task, seed=seed, dropout=lora.dropout)

    def save(self, model: nn.Module) -> None:
        """Write the adapter, or the whole model where all weights were trained."""
        tokenizer = loading.load_tokenizer(self.base, self.model_settings)
        if isinstance(model, PeftModel):
            folder = self.folder / self.adapter_folder
            loading.save_adapter(model, tokenizer, folder, self.base)
        else:
            folder = self.folder / "model"
            model.to(getattr(torch, self.config.model.dtype))
            assert isinstance(model, PreTrainedModel)
            loading.save_model(model, tokenizer, folder)
        verify_saved(model, probe_logits(model), str(folder), self.config.model)

    @functools.cached_property
    def pad_id(self) -> int:
        """The token that pads texts."""
        return pad_id(loading.load_tokenizer(self.base, self.model_settings))

    @property
    def data(self) -> Path:
        """Folder of the tokenised data sets."""
        return self.folder / "tokens"

    @property
    def stored_file(self) -> Path:
        """File beside the tokenised data sets: their digest and counts."""
        return self.data / "stored.json"

    def stored(self) -> dict[str, Any]:
        """Return what `stored_file` holds; empty where the data sets are missing or not whole."""
        try:
            return dict(json.loads(self.stored_file.read_text(encoding="utf-8")))
        except (*DAMAGE, OSError):
            return {}

    @property
    def began_whole(self) -> bool:
        """Whether it has trained on the tokens of a whole large set, as before sets were drawn."""
        counts = self.stored().get("counts", {})
        return self.last_checkpoint()[0] > 0 and "unread" not in counts.get(TRAIN, counts)

    def load_data(self, part: str) -> Dataset:
        """Load one of the tokenised data sets."""
        data = load_from_disk(str(self.data / part))
        assert isinstance(data, Dataset)
        return data

    @property
    def metrics_file(self) -> Path:
        """File of the logged steps, a JSON line each."""
        return self.folder / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        """File of the evaluations (``<stage>.eval_every``), a JSON line each."""
        return self.folder / "eval.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints."""
        return self.folder / "trainer"

    def last_checkpoint(self) -> tuple[int, Path | None]:
        """Return the steps and the folder of the newest whole checkpoint; (0, None): there is none.

        A checkpoint that a kill cut short has no readable trainer state and is passed over.
        """
        checkpoints = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            try:
                state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
                checkpoints.append((int(state["global_step"]), folder))
            except (*DAMAGE, OSError):
                continue
        return max(checkpoints, default=(0, None))

    def cut_records(self) -> int:
        """Drop the records of steps after the last checkpoint; return its step."""
        done, _ = self.last_checkpoint()
        for file in (self.metrics_file, self.evaluations_file):
            JsonlSink(file).truncate_after("step", done)
        return done
