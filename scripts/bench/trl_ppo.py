"""Runs TRL's PPO, in the environment that has TRL; takes its options as JSON.

Writes when each iteration ended, in seconds, into ``ends.json`` of the folder ``out``.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)


class Ends(TrainerCallback):
    """Notes when each iteration ended."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.at_s.append(time.perf_counter())


def main(text: str) -> None:
    options = json.loads(text)
    trl_ppo = importlib.import_module("trl.experimental.ppo")
    tokenizer = AutoTokenizer.from_pretrained(options["policy"], padding_side="left")
    ids = [tokenizer(prompt)["input_ids"] for prompt in options["prompts"]]
    prompts = Dataset.from_dict({"input_ids": ids})

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(options["reward"], num_labels=1)

    lora = LoraConfig(r=options["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    ends = Ends()
    trainer = trl_ppo.PPOTrainer(
        args=trl_ppo.PPOConfig(**_settings(options)),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(options["policy"]),
        ref_model=None,
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=prompts,
        eval_dataset=prompts,
        peft_config=lora,
        callbacks=[ends],
    )
    trainer.train()
    (Path(options["out"]) / "ends.json").write_text(json.dumps(ends.at_s), encoding="utf-8")


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    count = len(options["prompts"])
    return {
        "output_dir": options["out"],
        "per_device_train_batch_size": count,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "local_rollout_forward_batch_size": count,
        "num_ppo_epochs": 2,
        "total_episodes": options["iterations"] * count,
        "response_length": options["length"],
        "stop_token": "eos" if options["stops"] else None,
        "temperature": 1.0,
        "learning_rate": 1.4e-5,
        "gradient_checkpointing": False,  # ours doesn't recompute either
        "bf16": options["bf16"],
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
    }


if __name__ == "__main__":
    main(sys.argv[1])
