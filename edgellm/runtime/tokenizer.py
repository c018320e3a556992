"""Text to token ids and back, over the `tokenizers` library or a tokenizer object that the caller brings."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from edgellm.errors import ConfigError, EngineDirError

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer_json(path: Path, required: bool = False) -> dict[str, Any]:
    """The object in a JSON file, {} for a missing optional one; raises EngineDirError when it cannot be used."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise EngineDirError(f"{path} does not exist; export the model again, or copy the file from it") from None
    except (OSError, ValueError) as e:
        raise EngineDirError(f"{path} cannot be read as JSON ({e}); export the model again") from e
    if not isinstance(value, dict):
        raise EngineDirError(
            f"{path} must hold a JSON object, but holds a {type(value).__name__}; export the model again"
        )
    return value


class Tokenizer:
    """The one tokenizer interface of the runtime.

    `special_tokens` holds the texts that a chat template may name (bos_token, eos_token, ...), `special_ids` the
    tokens that decoding skips, `eos_token_ids` the tokens that end an answer.
    """

    def __init__(
        self,
        backend: Any,
        *,
        eos_token_ids: Iterable[int] = (),
        special_tokens: dict[str, str] | None = None,
        name: str = "tokenizer",
    ) -> None:
        """`backend` is a `tokenizers.Tokenizer` or any object with encode(text) and decode(ids)."""
        for method in ("encode", "decode"):
            if not callable(getattr(backend, method, None)):
                raise ConfigError(f"{name}: a {type(backend).__name__} has no method {method}(); it cannot tokenize")
        self._backend = backend
        self._name = name
        self._encode_takes_special = _takes(backend.encode, "add_special_tokens")
        self._decode_takes_special = _takes(backend.decode, "skip_special_tokens")
        self.eos_token_ids = frozenset(eos_token_ids)
        self.special_tokens = dict(special_tokens or {})
        self.special_ids = _special_ids(backend)

    @classmethod
    def from_dir(cls, directory: str | Path) -> Tokenizer:
        """From tokenizer.json and, where present, tokenizer_config.json, generation_config.json and config.json.

        The end tokens are generation_config's, else config's, else tokenizer_config's eos_token: what transformers'
        `generate` stops at. Raises EngineDirError when a file is missing or broken.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        read_tokenizer_json(path, required=True)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises plain Exception
            raise EngineDirError(
                f"{path} is not a tokenizer ({' '.join(str(e).split())}); export the model again"
            ) from e
        backend.no_truncation()
        backend.no_padding()
        settings = read_tokenizer_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(settings)
        eos = _eos_ids(directory, backend, special_tokens)
        return cls(backend, eos_token_ids=eos, special_tokens=special_tokens, name=str(path))

    @classmethod
    def wrap(cls, tokenizer: Any) -> Tokenizer:
        """From an object that the caller brings; its eos ids and special tokens are taken when it has them.

        Raises ConfigError when it has no encode and decode.
        """
        if isinstance(tokenizer, Tokenizer):
            return tokenizer
        name = f"given {type(tokenizer).__name__}"
        eos = getattr(tokenizer, "eos_token_ids", None)
        eos = getattr(tokenizer, "eos_token_id", None) if eos is None else eos
        special = {n: str(t) for n in _SPECIAL_NAMES if (t := getattr(tokenizer, n, None)) is not None}
        return cls(tokenizer, eos_token_ids=_id_list(eos, name), special_tokens=special, name=name)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's own vocabulary may be padded to more."""
        if isinstance(self._backend, tokenizers.Tokenizer):
            return int(self._backend.get_vocab_size(with_added_tokens=True))
        try:
            return len(self._backend)
        except TypeError:
            raise ConfigError(f"{self._name}: does not tell its vocabulary size (no len())") from None

    def to_json(self) -> str:
        """The content of a tokenizer.json; raises ConfigError for an object that is not one of `tokenizers`."""
        backend = getattr(self._backend, "backend_tokenizer", self._backend)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ConfigError(
                f"{self._name}: is a {type(self._backend).__name__}; guided output needs one of the library tokenizers"
            )
        return str(backend.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model wants around raw text, such as a BOS token."""
        options = {"add_special_tokens": add_special_tokens} if self._encode_takes_special else {}
        encoded = self._backend.encode(text, **options)
        return list(getattr(encoded, "ids", encoded))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; an incomplete character shows as U+FFFD."""
        options = {"skip_special_tokens": skip_special_tokens} if self._decode_takes_special else {}
        return str(self._backend.decode(list(token_ids), **options))

    def token_id(self, token: str) -> int:
        """Id of the one token whose text is `token`, such as "<|image_pad|>"; raises ConfigError when there is none."""
        lookup = getattr(self._backend, "token_to_id", None) or getattr(self._backend, "convert_tokens_to_ids", None)
        found = lookup(token) if lookup is not None else None
        if not isinstance(found, int):
            raise ConfigError(
                f"{self._name}: has no token {token!r}; the tokenizer and the model do not belong together"
            )
        return found


def _takes(function: Any, parameter: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in that does not tell its signature
        return False
    return parameter in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _special_ids(backend: Any) -> frozenset[int]:
    """Ids that decoding skips; empty for an object that does not tell."""
    if isinstance(backend, tokenizers.Tokenizer):
        return frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
    return frozenset(getattr(backend, "all_special_ids", ()))


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Named special tokens of a tokenizer_config.json, where each is a string or an object with `content`."""
    texts = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            texts[name] = value
    return texts


def _eos_ids(directory: Path, backend: tokenizers.Tokenizer, special_tokens: dict[str, str]) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        settings = read_tokenizer_json(directory / name)
        text_config = settings.get("text_config")
        for part in (settings, text_config if isinstance(text_config, dict) else {}):
            if part.get("eos_token_id") is not None:
                return _id_list(part["eos_token_id"], str(directory / name))
    eos = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    return [] if eos is None else [eos]


def _id_list(value: Any, where: str) -> list[int]:
    ids = [] if value is None else [value] if isinstance(value, int) else value
    if not isinstance(ids, (list, tuple, set, frozenset)) or any(not isinstance(i, int) for i in ids):
        raise ConfigError(f"{where}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return list(ids)
