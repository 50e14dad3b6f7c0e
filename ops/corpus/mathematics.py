"""Word problems with worked solutions, from reasoning-gym's `gsm_symbolic` templates."""

import importlib
import sys
import types
from pathlib import Path
from random import Random

TEMPLATES = 100
# The package's own list of templates that it does not trust (`tasks_need_fix` in gsm_symbolic.py) and never draws.
UNSOUND = {32, 35, 37, 61, 63, 65, 74, 76, 77, 79, 86, 87, 90, 97, 98}
SOUND = [template for template in range(TEMPLATES) if template not in UNSOUND]
# Held-out templates, not held-out seeds: a model that has learnt a template by heart must gain nothing from it.
HELD_OUT = SOUND[2::4]
TRAINING = [template for template in SOUND if template not in HELD_OUT]

PACKAGE = "reasoning_gym"
GENERATORS = f"{PACKAGE}.arithmetic.gsm_symbolic"


class Problems:
    """An endless, reproducible supply: what comes next depends on the purpose and on how many came before."""

    def __init__(self, wheels: Path, templates: list[int], purpose: str) -> None:
        self._modules = _load_generators(wheels)
        self._templates = templates
        self._purpose = purpose
        self._produced = 0

    def next(self) -> str:
        """One problem and its solution. Templates take turns, in a new order each round."""
        round_index, place = divmod(self._produced, len(self._templates))
        order = Random(f"{self._purpose} round {round_index}").sample(self._templates, len(self._templates))
        template = order[place]
        self._produced += 1
        generate = getattr(self._modules[template // 50], f"generate_{template}")
        problem = generate(Random(f"{self._purpose} {template} {round_index}"), 1.0)
        return f"Question: {problem['question'].strip()}\nAnswer: {problem['metadata']['answer_cot'].strip()}"


def _load_generators(wheels: Path) -> list[types.ModuleType]:
    """Imports the two generator modules straight from the wheel.

    Importing the package itself would run all of its generators and need a dozen other packages. Bare parents with
    nothing but a search path let Python find these two, which need only the standard library.
    """
    (wheel,) = wheels.glob(f"{PACKAGE}-*.whl")
    parent = ""
    for part in GENERATORS.split("."):
        parent = f"{parent}.{part}".lstrip(".")
        package = types.ModuleType(parent)
        package.__path__ = [f"{wheel}/{parent.replace('.', '/')}"]
        sys.modules[parent] = package
    return [importlib.import_module(f"{GENERATORS}.{name}") for name in ("generators_00_49", "generators_50_99")]
