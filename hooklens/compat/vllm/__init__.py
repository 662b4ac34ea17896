"""HookLens' hook points on models that vLLM serves: captures and edits in a running engine.

`LLM(..., worker_extension_cls="hooklens.compat.vllm.WorkerExtension")` and `VLLMModel(llm)`; docs/serving.md has the
rest. Importing this imports no vLLM.
"""

from hooklens.compat.vllm.engine import WorkerExtension
from hooklens.compat.vllm.served import VLLMModel

__all__ = ["VLLMModel", "WorkerExtension"]
