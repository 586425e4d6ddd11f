"""Causal and encoder-decoder language models with a value head."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fastppo.models.value_head import VALUE_HEAD_ARGUMENTS, ValueHead
from fastppo.models.wrapper import PreTrainedModelWrapper
from fastppo.wanted import want


class _LanguageModelWithValueHead(PreTrainedModelWrapper):
    supported_args = VALUE_HEAD_ARGUMENTS
    lm_head_namings: list[str]
    _takes_encoder_decoder = False

    def __init__(self, pretrained_model, **kwargs):
        good = isinstance(pretrained_model, self.supported_pretrained_model_architectures)
        wanted = "a transformers or PEFT language model (from_pretrained loads one by name)"
        want(good, type(self).__name__, "pretrained_model", wanted, pretrained_model)
        head_kwargs = {name: kwargs.pop(name) for name in self.supported_args if name in kwargs}
        super().__init__(pretrained_model, **kwargs)
        self._check_model()
        head_kwargs_init = {k: v for k, v in head_kwargs.items() if k != "summary_dropout_prob"}
        self.v_head = ValueHead(self.config, **head_kwargs)
        self.v_head.init_weights(**head_kwargs_init)

    def _check_model(self) -> None:
        model = self.pretrained_model
        if not any(hasattr(model, name) for name in self.lm_head_namings) and model.get_output_embeddings() is None:
            raise ValueError(
                f"The model does not have a language model head, please use a model that has one: {type(model).__name__} has "
                f"none of {', '.join(self.lm_head_namings)} and no output embeddings"
            )
        if getattr(self.config, "is_encoder_decoder", False) != self._takes_encoder_decoder:
            other = (
                "AutoModelForCausalLMWithValueHead"
                if self._takes_encoder_decoder
                else "AutoModelForSeq2SeqLMWithValueHead"
            )
            raise ValueError(f"{type(self).__name__} does not fit {type(model).__name__}: use {other}")

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs,
    ):
        """(logits [B, T, V] in float32, loss or None, values [B, T][, past_key_values]).

        kwargs go to the wrapped model (labels, position_ids, decoder_input_ids, ...). T is the decoder's for an
        encoder-decoder model.
        """
        # PEFT's prefix tuning supplies past_key_values itself
        if not (self.is_peft_model and self.pretrained_model.active_peft_config.peft_type == "PREFIX_TUNING"):
            kwargs["past_key_values"] = past_key_values
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = (output.decoder_hidden_states if self._takes_encoder_decoder else output.hidden_states)[-1]
        values = self.v_head(hidden).squeeze(-1).to(output.logits.device)
        result = (output.logits.to(torch.float32), output.loss, values)
        return (*result, output.past_key_values) if return_past_key_values else result


class AutoModelForCausalLMWithValueHead(_LanguageModelWithValueHead):
    """A decoder-only language model (GPT-2, Llama, Qwen, ...) with a value head.

    summary_dropout_prob, v_head_initializer_range, v_head_init_strategy: see ValueHead.
    """

    transformers_parent_class = AutoModelForCausalLM
    lm_head_namings = ["lm_head", "embed_out"]


class AutoModelForSeq2SeqLMWithValueHead(_LanguageModelWithValueHead):
    """An encoder-decoder language model (T5, BART, ...) with a value head on the decoder's hidden states.

    summary_dropout_prob, v_head_initializer_range, v_head_init_strategy: see ValueHead.
    """

    transformers_parent_class = AutoModelForSeq2SeqLM
    lm_head_namings = ["lm_head", "embed_out", "output_projection"]
    is_encoder_decoder = True  # the causal class has no such attribute: scripts ask with hasattr
    _takes_encoder_decoder = True


SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)
