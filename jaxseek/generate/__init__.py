"""Generation. The package is also the function: `jaxseek.generate(model, tokenizer, prompts, ...)`."""

import sys
import types
from typing import Any


class _Generate(types.ModuleType):
    """Importing a submodule binds the package to `jaxseek.generate`, which has to stay a function as well."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[str]:
        from jaxseek.generate.text import generate

        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Generate
