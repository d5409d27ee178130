"""Imported before all that imports megatron-core: without torch's compiler, as a run starts."""

from megasparse.megatron.import_without_compile import import_megatron

import_megatron()
