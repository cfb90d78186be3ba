"""Load the inputs of the stage evaluate; refuse wrong or missing ones before it samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.data.datasets.instructions import Instruction, load_instructions
from rlhf_ray.data.datasets.reference_answers import reference_answers
from rlhf_ray.driver.checkpoint import Checkpoints
from rlhf_ray.engines.scoring import template_checks
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import load_tokenizer
from rlhf_ray.people.preferences import preferences_path, read_preferences
from rlhf_ray.runs.datasets import held_out_prompts
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.serving.text_generation import prompt_ids
from rlhf_ray.stages.evaluate.models import AdapterFiles, compared_models
from rlhf_ray.types import Prompt


@dataclass(frozen=True)
class Inputs:
    """Models, prompts and judges of one evaluation."""

    config: Config
    sft_model: str
    """Folder or hub name of the model under every adapter."""
    reward_model: str | None
    tokenizer: PreTrainedTokenizerBase
    policy_version: int | None
    """Of the newest committed policy; None: PPO has not run."""
    adapters: Mapping[str, AdapterFiles]
    """Model -> its adapter, sft first."""
    prompts: Sequence[Prompt]
    """Held-out prompts."""
    has_gold: bool
    """Whether the prompts' gold score is known: they are the synthetic site's."""
    judged_by: Sequence[str]
    """What decides which answer is better; the first one gives the win rate."""
    instructions: Sequence[Instruction]
    instruction_prompts: Sequence[Prompt]


def load_inputs(folder: RunFolder) -> Inputs:
    """Load models, prompts and instructions, and check what decides between answers.

    Raises:
        DataError: there is no trained policy, or something that the config asks for is missing.
    """
    config, settings = folder.config, folder.config.evaluate
    sft_model, reward_model = folder.sft_model(), folder.reward_model()
    tokenizer = load_tokenizer(sft_model, config.model)
    newest = Checkpoints(folder.path / "checkpoints", config.ppo.keep_checkpoints, {}).latest()
    adapters = compared_models(folder, newest)
    checks = template_checks(config, reward_model, sft_model)
    prompts = held_out_prompts(config, folder, tokenizer, settings.num_prompts, checks)
    has_gold = _is_synthetic(folder)
    judged_by = _judged_by(config, has_gold, prompts)
    if "people" in judged_by:
        _require_verdicts(folder)
    instructions = load_instructions(settings.instructions) if settings.instructions else ()
    return Inputs(
        config=config,
        sft_model=sft_model,
        reward_model=reward_model,
        tokenizer=tokenizer,
        policy_version=newest.version if newest else None,
        adapters=adapters,
        prompts=prompts,
        has_gold=has_gold,
        judged_by=judged_by,
        instructions=instructions,
        instruction_prompts=_instruction_prompts(config, tokenizer, instructions),
    )


def _is_synthetic(folder: RunFolder) -> bool:
    """Return whether the held-out questions are the synthetic site's."""
    prepared, data = folder.summary("prepare"), folder.config.data
    is_user_data = bool(data.eval or data.prompts)
    return not is_user_data and prepared is not None and bool(prepared["synthetic"])


def _judged_by(config: Config, has_gold: bool, prompts: Sequence[Prompt]) -> Sequence[str]:
    """Return the judges that the config names, else the best one that the data allows."""
    judged_by = config.evaluate.judged_by
    if judged_by is None:
        return ["gold" if has_gold else "reward"]
    if "gold" in judged_by and not has_gold:
        raise DataError(
            "evaluate.judged_by names gold, which is known of the synthetic site's questions alone "
            "(prepare without prepare.posts, and neither data.prompts nor data.eval); leave it out"
        )
    if "rouge" in judged_by and not any(map(reference_answers, prompts)):
        raise DataError(
            f"evaluate.judged_by names rouge, and none of the {len(prompts)} held-out prompts has "
            "a text in a column reference, completion or chosen; name one in the data set's "
            "columns, for example columns: {reference: <its name>}"
        )
    return judged_by


def _require_verdicts(folder: RunFolder) -> None:
    path = preferences_path(folder.path)
    if not read_preferences(path).standing():
        raise DataError(
            f"evaluate.judged_by names people, and {path} holds no verdict; evaluate without "
            f"people, rank the answers with rlhf-ray rank {folder.path}, and evaluate again"
        )


def _instruction_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, instructions: Sequence[Instruction]
) -> list[Prompt]:
    """Lay out each instruction as the first message of a conversation."""
    max_tokens = config.model.max_length - config.rollout.max_tokens
    prompts = []
    for index, instruction in enumerate(instructions):
        messages = [{"role": "user", "content": instruction.prompt}]
        ids = prompt_ids(config, tokenizer, messages)
        if len(ids) > max_tokens:
            raise DataError(
                f"evaluate.instructions: {instruction.prompt[:80]!r} has {len(ids)} tokens, and "
                f"model.max_length less rollout.max_tokens leaves {max_tokens}; shorten it, or "
                "raise model.max_length"
            )
        prompts.append(Prompt(f"instruction-{index}", instruction.prompt, tuple(ids)))
    return prompts
