"""What a recipe does when torchrun or accelerate has started it in several processes, with DDP."""

from __future__ import annotations

from trl import ModelConfig, SFTConfig

from grades_trl.config import GradESConfig
from grades_trl.distributed import decided_by_main
from grades_trl.recipe.arguments import RecipeArguments
from grades_trl.recipe.resume import set_up_resume


def set_up_run(recipe: RecipeArguments, training: SFTConfig, model_args: ModelConfig, grades: GradESConfig) -> None:
    """[`set_up_resume`] in the main process, which alone reads and writes the output folder. All processes go on from
    the checkpoint that it has found.

    Raises:
        ValueError: in all processes, see [`set_up_resume`].
    """

    def find_checkpoint() -> str | None:
        set_up_resume(recipe, training, model_args, grades)
        return training.resume_from_checkpoint

    recipe.resume, training.resume_from_checkpoint = None, decided_by_main(find_checkpoint)
