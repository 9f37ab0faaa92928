"""Decode continues from the first token that prefill sampled, where the result is exactly the same.

The token is appended to the prompt of decode's request before scheduling. vLLM then sees a request with one more
prompt token, all but the last one computed, and its next step computes the second output token
(:mod:`pdtransport.vllm.patches.appended_token`).
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from pdtransport.settings import Settings
from pdtransport.vllm.patches.appended_token import PATCH, append

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

# Sampling parameters that do not depend on the tokens sampled so far: with them, the second token is the same as if
# decode had sampled the first token itself. A parameter that is in neither table must have its default value.
_STATELESS = frozenset(
    {
        "_all_stop_token_ids", "_eos_token_id", "extra_args", "flat_logprobs", "ignore_eos",
        "include_stop_str_in_output", "max_tokens", "min_p", "n", "output_kind", "output_text_buffer_length", "seed",
        "skip_clone", "skip_reading_prefix_cache", "skip_special_tokens", "stop_token_ids", "stream_interval",
        "temperature", "top_k", "top_p",
    }
)  # fmt: skip
_CODES = {
    "presence_penalty": "penalties",
    "frequency_penalty": "penalties",
    "repetition_penalty": "penalties",
    "logprobs": "logprobs",
    "prompt_logprobs": "logprobs",
    "logprob_token_ids": "logprobs",
    "structured_outputs": "structured_output",
    "min_tokens": "min_tokens",
    "stop": "stop",
    "bad_words": "bad_words",
    "logit_bias": "logit_bias",
    "allowed_token_ids": "allowed_token_ids",
    "thinking_token_budget": "reasoning",
}
_TAIL_TOKENS = 8  # last tokens of a prompt to decode: more than the bytes of one character


class FirstTokens:
    """Decides for one engine which requests may continue on decode from prefill's first token."""

    def __init__(self, config: VllmConfig, settings: Settings) -> None:
        self._model = config.model_config
        self._tokenizer: Any = None
        self.unsupported = _why_unsupported(config, settings)  # reason code; empty if this engine supports it

    def why_not(self, request: Request) -> str:
        """Reason code why continuing from another engine's first token would not be exact; empty if it would be."""
        if self.unsupported:
            return self.unsupported
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None or request.prompt_is_token_ids is not None:
            return "prompt"
        if request.resumable:
            return "streamed_input"
        if set(params.extra_args or ()) - {"kv_transfer_params"}:
            return "extra_args"
        if params.seed is not None and not _is_greedy(params):
            return "seed"
        return _stateful(params)

    def of(self, request: Request, promised: bool) -> tuple[int | None, str]:
        """Prefill: the first token of a finished request that decode can continue from.

        Args:
            promised: decode promised to continue from it.

        Returns:
            The token and an empty string, or None and a reason code.
        """
        from vllm.v1.request import RequestStatus

        declined = self.why_not(request)
        if declined:
            return None, declined
        if request.status is not RequestStatus.FINISHED_LENGTH_CAPPED or len(request.output_token_ids) != 1:
            return None, "stopped"  # the first token was also the last one: decode finds that out itself
        if not promised:
            return None, "no_promise"
        token = int(request.output_token_ids[0])
        declined = self.why_no_token(request, token)
        return (None, declined) if declined else (token, "")

    def why_no_token(self, request: Request, token: int) -> str:
        """Prefill: reason code why the text of ``token`` can't be separated from the text after it; empty if it can.

        Decode's detokenizer sees the prompt (with ``token``) and its own tokens. A character whose bytes are split
        between ``token`` and a neighbour would be lost.
        """
        tokenizer = self._get_tokenizer()
        if tokenizer is None or token in tokenizer.all_special_ids:
            return "special_token"
        text = tokenizer.decode([token])
        tail = tokenizer.decode(list(request.prompt_token_ids or ())[-_TAIL_TOKENS:])
        return "partial_character" if not text or "\ufffd" in text or tail.endswith("\ufffd") else ""

    def append(self, request: Request, token: int) -> bool:
        """Let the request continue from ``token``; call before it is scheduled.

        Returns:
            False if ``token`` is not in the model's vocabulary; the request is then unchanged.
        """
        if not 0 <= token < self._model.get_vocab_size():
            return False
        append(request, token)
        return True

    def _get_tokenizer(self) -> Any:
        """The tokenizer cached in vLLM's scheduler process; None with ``--skip-tokenizer-init``."""
        if self._tokenizer is None and not self._model.skip_tokenizer_init:
            from vllm.tokenizers import cached_tokenizer_from_config

            self._tokenizer = cached_tokenizer_from_config(model_config=self._model)
        return self._tokenizer


def _is_greedy(params: Any) -> bool:
    from vllm.sampling_params import SamplingType

    return bool(params.sampling_type is SamplingType.GREEDY)


def _stateful(params: Any) -> str:
    from vllm.sampling_params import SamplingParams

    plain = SamplingParams()
    for name in params.__struct_fields__:
        if name not in _STATELESS:
            given, default = getattr(params, name), getattr(plain, name)
            if hasattr(given, "__array__"):
                return "sampling_params"
            off = (given is None or given is False or given == []) and not default  # some servers fill in such values
            if not off and given != default:
                return _CODES.get(name, "sampling_params")
    return ""


def _why_unsupported(config: VllmConfig, settings: Settings) -> str:
    model = config.model_config
    if model.logits_processors or entry_points(group="vllm.logits_processors"):
        return "logits_processors"  # they may depend on the tokens sampled so far
    # A reasoning parser reads the text of decode's tokens only and would miss the first one.
    if config.structured_outputs_config.reasoning_parser or model.hf_config.model_type == "gpt_oss":
        return "reasoning"
    if model.is_encoder_decoder or model.skip_tokenizer_init:
        return "model"
    return "" if PATCH.allowed(settings, config) else "vllm_version" if settings.patches.first_token else "declined"
