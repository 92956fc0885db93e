"""Text to token ids and back: any `tokenizer.json`, with the folder's special tokens, end tokens and chat template.

`encode` adds nothing: a caller that wants <bos> puts it there.  Special tokens written in the text are recognised, as chat templates need.
`decode` leaves special tokens out.  The chat template sees no clock (`strftime_now`), so that a run renders the same prompts on any day.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from athanor import atomic
from athanor.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json")
SPECIAL_SYMBOLS = ("<pad>", "<bos>", "<eos>", "<unk>")


class Tokenizer:
    """A `tokenizers` tokenizer with what generation needs to know about it."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, generation_config: dict | None = None, *, chat_template: str | None = None):
        """config: tokenizer_config.json, with eos_token and optionally bos_token, pad_token.  generation_config: generation_config.json."""
        self._backend, self._config, self._generation_config = backend, dict(config), dict(generation_config or {})
        backend.no_padding()
        backend.no_truncation()
        self.chat_template = chat_template
        self.bos_id, eos_id, pad_id = (self._token_id(f"{kind}_token") for kind in ("bos", "eos", "pad"))
        listed = _as_list(self._generation_config.get("eos_token_id"))
        if eos_id is None and not listed:
            raise UserError("tokenizer: no end token; wanted eos_token in tokenizer_config.json or eos_token_id in generation_config.json")
        self.eos_id: int = listed[0] if eos_id is None else eos_id
        self.eos_ids: frozenset[int] = frozenset([self.eos_id, *listed])
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        # Ids may have gaps, and the embedding must cover the largest one.
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        # One dict look-up per word: five times faster than the library, and a word that is missing is named, where the library writes <unk>.
        plain = isinstance(backend.model, models.WordLevel) and isinstance(backend.pre_tokenizer, pre_tokenizers.WhitespaceSplit)
        self._words = backend.get_vocab() if plain and backend.normalizer is None else None

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Read a HuggingFace model folder, or one tokenizer.json with the files beside it.  Raises UserError on a missing or bad file."""
        path = Path(path)
        atomic.recover(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"tokenizer: {file} does not exist; wanted a tokenizer.json or a folder that has one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise UserError(f"tokenizer: {file} is not a valid tokenizer.json: {error}") from error
        folder = file.parent
        names = "special_tokens_map.json", "tokenizer_config.json", "generation_config.json", "config.json"
        special, config, generation_config, model_config = (
            atomic.read_json(folder / name, "tokenizer") if (folder / name).is_file() else {} for name in names
        )
        config = {**special, **config}
        eos_ids = dict.fromkeys([*_as_list(generation_config.get("eos_token_id")), *_as_list(model_config.get("eos_token_id"))])
        if eos_ids:
            generation_config["eos_token_id"] = list(eos_ids)
        template = config.pop("chat_template", None)
        if isinstance(template, list):  # several named ones, the older layout
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        template_file = folder / "chat_template.jinja"
        if template_file.is_file():
            template = template_file.read_text(encoding="utf-8")
        try:
            return cls(backend, config, generation_config, chat_template=template)
        except UserError as error:
            raise UserError(f"{error} (in {folder})") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, generation_config.json and, if there is one, chat_template.jinja."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"tokenizer: cannot write {folder}: {error.strerror}") from error
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config}
        eos_ids = [self.eos_id, *sorted(self.eos_ids - {self.eos_id})]
        generation_config = {**self._generation_config, "eos_token_id": eos_ids, "pad_token_id": self.pad_id}
        if self.bos_id is not None:
            generation_config["bos_token_id"] = self.bos_id
        atomic.write_file(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        atomic.write_file(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        atomic.write_file(folder / "generation_config.json", json.dumps(generation_config, indent=2) + "\n")
        if self.chat_template is not None:
            atomic.write_file(folder / "chat_template.jinja", self.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`.  A symbol tokenizer raises UserError on a symbol it does not have."""
        if self._words is None:
            return self._backend.encode(text, add_special_tokens=False).ids
        try:
            return [self._words[word] for word in text.split()]
        except KeyError as error:
            shown = text if len(text) <= 100 else text[:100] + " ..."
            raise UserError(f"tokenizer: unknown symbol {error} in {shown!r}; wanted symbols of the vocabulary, separated by spaces") from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with all cores for a tokenizer that works on pieces of words."""
        if self._words is not None:
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt as every stage uses them: the beginning-of-sequence token first where there is one."""
        ids = self.encode(text) if text else []
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` (list, array or tensor) without special tokens."""
        return self._backend.decode(_plain(ids), skip_special_tokens=True)

    def decode_batch(self, batch: Sequence[Iterable[int]]) -> list[str]:
        return self._backend.decode_batch([_plain(ids) for ids in batch], skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._backend.id_to_token(int(token_id))

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """Render {"role", "content"} messages with the folder's Jinja template, in a sandbox.

        variables: what else the template asks for (tools, enable_thinking ...).  Raises UserError without a template, or when it fails.
        """
        if self.chat_template is None:
            raise UserError("apply_chat_template: no chat template; wanted chat_template.jinja or chat_template in tokenizer_config.json")
        from jinja2 import TemplateError

        named = {kind: _content(self._config.get(kind)) for kind in ("bos_token", "eos_token", "pad_token", "unk_token")}
        special = {kind: token for kind, token in named.items() if token is not None}
        try:
            template = _jinja_environment().from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **{**special, **variables})
        except (TemplateError, TypeError) as error:
            raise UserError(f"apply_chat_template: the chat template failed: {error}") from error

    def _token_id(self, kind: str) -> int | None:
        token = _content(self._config.get(kind))
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"tokenizer: {kind} is {token!r}, which is not in the vocabulary")
        return token_id


def symbol_tokenizer(symbols: list[str]) -> Tokenizer:
    """Build the tokenizer whose text is symbols separated by spaces; ids 0-3 are <pad> <bos> <eos> <unk>, then `symbols` in their order.

    encode -> decode is exact on text with single spaces.  Raises ValueError on a repeated, empty, reserved or spaced symbol.
    """
    for i, symbol in enumerate(symbols):
        if not symbol or symbol.split() != [symbol]:
            raise ValueError(f"symbol_tokenizer: symbol {i} is {symbol!r}, wanted text without spaces")
        if any(special in symbol for special in SPECIAL_SYMBOLS):
            raise ValueError(f"symbol_tokenizer: symbol {symbol!r} contains one of the reserved {' '.join(SPECIAL_SYMBOLS)}")
    if len(set(symbols)) != len(symbols):
        repeated = next(s for i, s in enumerate(symbols) if s in symbols[:i])
        raise ValueError(f"symbol_tokenizer: symbol {repeated!r} is listed twice")
    vocab = {symbol: i for i, symbol in enumerate([*SPECIAL_SYMBOLS, *symbols])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # <unk> stays an ordinary symbol: a model that samples it must be seen doing so.
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL_SYMBOLS[:3]])
    config = {f"{kind}_token": f"<{kind}>" for kind in ("pad", "bos", "eos", "unk")}
    return Tokenizer(backend, {**config, "clean_up_tokenization_spaces": False})


def _jinja_environment():
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks the assistant's words for loss masks; here it renders its body."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes < and > for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _content(token: str | dict | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _plain(ids: Iterable[int]) -> list[int]:
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)
