"""Once imported, delays garbage collection until `exempt_imports` is called: import it first.

Imports create many objects and little garbage, and looking for it among ever more objects takes a sixth of their time.
Later it would take even more: DeepSpeed collects garbage whenever it builds an engine or destroys one, and to search
all imported objects each time would take longer than most models of tests need for a step.
"""

import gc

gc.disable()


def exempt_imports() -> None:
    """Exempts everything imported so far from garbage collection, and starts it again."""
    gc.freeze()
    gc.enable()
