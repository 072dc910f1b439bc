"""Imported last by the fork server: what it imported before is exempt from garbage collection, in its ranks too.

conftest.py has the reason, and does the same for pytest's own processes.
"""

import gc

gc.collect()
gc.freeze()
