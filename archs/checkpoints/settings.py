"""The fields of a config.json, each of which is used, known to leave the logits alone, or refused by name."""

import reprlib
from collections.abc import Mapping
from typing import Any

# Fields of every family that say nothing about the logits of a causal forward pass at evaluation.
NEUTRAL = {"_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"}
NEUTRAL |= {"_attn_implementation_autoset", "bos_token_id", "eos_token_id", "pad_token_id", "unsloth_fixed"}
NEUTRAL |= {"attention_dropout", "initializer_range", "chunk_size_feed_forward", "use_cache"}
NEUTRAL |= {"id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict"}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


class Settings:
    """The fields of a config.json, to be asked for one by one; `close` refuses what nobody asked for.

    Args:
        fields: the object in config.json, with its model_type.
    """

    def __init__(self, fields: Mapping[str, Any]):
        self.fields, self.family = fields, fields["model_type"]
        self._asked = set(NEUTRAL)
        self.only("is_encoder_decoder", False)
        if fields.get("quantization_config") is not None:
            self.refuse("quantization_config", "weights in plain numbers are")

    def take(self, name: str, *default: Any) -> Any:
        """The value of a field; where it is absent, the default, if there is one. A null is a value only where the
        default is None.

        Raises:
            ValueError: for a null, or a field that is absent and has no default.
        """
        self._asked.add(name)
        if not default:
            self.require(name)
        value = self.fields.get(name, *default)
        if value is None and default != (None,):
            self.refuse(name, "null stands for no value here")
        return value

    def require(self, name: str) -> None:
        """
        Raises:
            ValueError: for a field that is absent.
        """
        if name not in self.fields:
            raise ValueError(f"{self.family}: config.json lacks {name}, without which the model is not known")

    def only(self, name: str, *modelled: Any) -> None:
        """Take a field of which these values are modelled, the first of them being what its absence means.

        Raises:
            ValueError: for another value.
        """
        self._asked.add(name)
        if self.fields.get(name, modelled[0]) not in modelled:
            self.refuse(name, " or ".join(map(repr, modelled)) + " is")

    def same(self, name: str, value: Any, as_name: str) -> None:
        """Take a field that may be there, and then says again what another does.

        Raises:
            ValueError: where it says something else.
        """
        self._asked.add(name)
        if self.fields.get(name, value) != value:
            self.refuse(name, f"the same as {as_name}, {value!r}, is")

    def count(self, name: str, most: int | None = None, least: int = 1) -> int:
        """Take a number of things.

        Raises:
            ValueError: for one below `least` or above `most`.
        """
        number = self.take(name)
        if number < least or (most is not None and number > most):
            self.refuse(name, f"{least} or more is" if most is None else f"between {least} and {most} is")
        return number

    def ignore(self, *names: str) -> None:
        """Take fields that leave the logits alone."""
        self._asked.update(names)

    def activation(self, name: str, default: str) -> str:
        """Our name of the activation that a field names.

        Raises:
            ValueError: for one that is not modelled.
        """
        activation = self.take(name, default)
        if activation not in ACTIVATIONS:
            self.refuse(name, f"{', '.join(ACTIVATIONS)} are")
        return ACTIVATIONS[activation]

    def layer_types(self, default: list[str], modelled: Mapping[str, str], name: str = "layer_types") -> list[str]:
        """The kind of each layer; modelled: ours for each of their words, older ones included.

        Raises:
            ValueError: for another kind, or another number of layers than the default has.
        """
        kinds = self.take(name, None)
        kinds = default if kinds is None else kinds
        if len(kinds) != len(default) or set(kinds) - set(modelled):
            self.refuse(name, f"one of {', '.join(modelled)} for each of {len(default)} layers is")
        return [modelled[kind] for kind in kinds]

    def refuse(self, name: str, modelled: str) -> None:
        """
        Raises:
            ValueError: names the field, its value and what is modelled.
        """
        raise ValueError(f"{self.family}: {name}={reprlib.repr(self.fields.get(name))} is not modelled: {modelled}")

    def close(self) -> None:
        """
        Raises:
            ValueError: for fields that hold a value and that nobody asked for.
        """
        left = {name: x for name, x in self.fields.items() if x is not None and name not in self._asked}
        if left:
            listed = ", ".join(f"{name}={reprlib.repr(x)}" for name, x in left.items())
            raise ValueError(f"{self.family}: {listed} is not modelled: the family is not known to have such fields")
