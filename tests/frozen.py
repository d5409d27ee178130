"""What a fork server imports last: all that is there by then is no matter for garbage collection.

Forks inherit that. Otherwise each of them walks, and by that copies, hundreds of megabytes of
modules that it will never free.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
