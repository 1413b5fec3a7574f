"""The ways to ask for a reply, which conversations and `Mllama` have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal, overload

from ..checks import Switch, Whole, checked
from ..errors import ImageError, RequestError
from ..settings import DEFAULT_PROMPT
from ..store.defaults import Defaults
from ..vision.embedding import ImageInput
from ..words import brief
from . import completions
from .openai import MAX_REPLIES, ChatRequest, Messages, plain_options
from .options import ReplyOptions
from .pieces import Pieces
from .reply import Reply

CAPTION_TOKENS = 256


class Answers(ABC):
    """`reply`, and the methods that are built on it."""

    @abstractmethod
    def _begin_replies(self, messages: Messages, options: ReplyOptions, n: int) -> list[Reply]:
        """Replies to one prompt, of which nothing is computed yet."""

    @property
    @abstractmethod
    def _model_name(self) -> str:
        """For OpenAI's shapes."""

    @property
    @abstractmethod
    def _defaults(self) -> Defaults:
        """The values that count where a caller gives none."""

    def reply(
        self,
        messages: Messages | None = None,
        *,
        image: ImageInput | None = None,
        prompt: str = DEFAULT_PROMPT,
        options: ReplyOptions | None = None,
        **more: Any,
    ) -> Reply:
        """The reply to a conversation, or to a question about an image.

        messages: as in `create_chat_completion`; or else image and prompt, as in `caption`
        options:  checked options; or else `more`, those of `create_chat_completion` by name

        What the model brings along (`Defaults`) counts where the caller says nothing: options unless
        they are checked already, system message and first messages always.

        Everything is checked here; the pieces of text are computed as they are asked for. A reply ends with
        an error once the conversation is used for something else; close it, or read it to its end.

        Raises ImageError, RequestError, ContextFullError, BusyError; reading it raises BackendError and
        Aborted too.
        """
        if (messages is None) == (image is None):
            raise RequestError("reply needs either messages or an image")
        if not isinstance(options, (ReplyOptions, type(None))):
            raise RequestError(f"options must be ReplyOptions, not {brief(options)}")
        if not isinstance(prompt, str):
            raise RequestError(f"prompt must be a text, not {brief(prompt)}")
        if options is not None and more:
            raise RequestError(f"reply takes checked options or {', '.join(more)}, not both")
        if messages is None:
            content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
            messages = [{"role": "user", "content": content}]
        if options is None:
            plain = plain_options(more)
            plain.pop("stream_options", None)
            if plain.pop("n", 1) != 1:
                raise RequestError("this writes one reply; for n use create_chat_completion or replies")
            options = ReplyOptions.checked({**self._defaults.options, **plain})
        return self.replies(messages, n=1, options=options)[0]

    def replies(self, messages: Messages, *, n: int, options: ReplyOptions) -> list[Reply]:
        """Several replies to one conversation, to be read one after the other.

        The prompt is computed once, for the first. Each has a seed of its own: that of the options and its
        index. Raises what `reply` raises.
        """
        if not isinstance(options, ReplyOptions):
            raise RequestError(f"options must be ReplyOptions, not {brief(options)}")
        n = checked("n", Whole(1, MAX_REPLIES), n)
        return self._begin_replies(self._defaults.precede(messages), options, n)

    @overload
    def caption(
        self, image: ImageInput, prompt: str = ..., *, stream: Literal[False] = ..., **options: Any
    ) -> str: ...
    @overload
    def caption(
        self, image: ImageInput, prompt: str = ..., *, stream: Literal[True], **options: Any
    ) -> Iterator[str]: ...

    def caption(
        self, image: ImageInput, prompt: str = DEFAULT_PROMPT, *, stream: bool = False, **options: Any
    ) -> str | Iterator[str]:
        """The model's answer to a question about an image.

        image:   a path, bytes, a file object, a data URI, a PIL image, an array, a TiledImage, an
                 ImageEmbedding
        stream:  True: an iterator of pieces of text, a `Reply`
        options: max_tokens (256) and the others of `create_chat_completion`

        Raises what `create_chat_completion` raises.
        """
        is_streamed = checked("stream", Switch(), stream)
        if image is None:
            raise ImageError("image is None; give a path, bytes, a PIL image or an array")
        options.setdefault("max_tokens", self._defaults.options.get("max_tokens", CAPTION_TOKENS))
        reply = self.reply(image=image, prompt=prompt, **options)
        return reply if is_streamed else reply.read()

    @overload
    def create_chat_completion(
        self, messages: Messages, *, stream: Literal[False] = ..., **options: Any
    ) -> dict[str, Any]: ...
    @overload
    def create_chat_completion(
        self, messages: Messages, *, stream: Literal[True], **options: Any
    ) -> Iterator[dict[str, Any]]: ...

    def create_chat_completion(
        self, messages: Messages, *, stream: bool = False, **options: Any
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """The reply to a conversation, in OpenAI's shapes.

        messages: [{"role": "user", "content": "text" or [part, ...]}, ...]; a part is {"type": "text",
                  "text": ...}, {"type": "image_url", "image_url": {"url": ...}} or {"type": "image", "image":
                  ...} with whatever `caption` takes as an image; "images": [...] beside the content, as
                  Ollama has it, comes first. The last message may be the assistant's: the reply then
                  continues it
        stream:   True: an iterator of chunks, of which the last has usage and timings
        options:
          max_tokens:      most tokens of the reply; None: until n_ctx is full (the default);
                           max_completion_tokens is the same
          temperature:     0 (the default): always the likeliest token
          top_k, top_p, min_p, samplers, seed, repeat_penalty, presence_penalty, frequency_penalty,
          logit_bias:      as in `SamplingOptions`
          n:               how many replies to write, 8 at most; the prompt is computed once
          logprobs, top_logprobs: tell how likely the tokens of the reply and others were, by the logits of
                           the model alone, before temperature and all other options
          stop:            a string, or some, that end the reply and are not shown; they do not end JSON
          response_format: {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {...}}},
                           {"type": "regex", "regex": ...} and others: see `text.grammar.grammar_of`
          grammar:         GBNF that the reply must follow
          tools, tool_choice, parallel_tool_calls: functions that the model may call, in OpenAI's shapes. A
                           reply that is a call has it in "tool_calls", and the finish_reason "tool_calls"
          continue_final_message: True: the last message must be the assistant's; False: it is closed, and
                           another message of the assistant's begins
          chat_template_kwargs: variables for the chat template, such as {"date_string": "26 Jul 2024"}
          max_tiles:       most tiles of an image; "detail": "low" of an image_url means 1, "high" and "auto"
                           leave it to this option and the model
          stream_options:  {"include_usage": True}: usage comes in a chunk of its own, as OpenAI's
          Other parameters of OpenAI's are taken where they change nothing, and else refused by name.

        What the caches hold already, of this conversation or the last one, is not computed again. Everything
        is checked before anything is computed. An open stream ends with an error once the object is used for
        something else; close it, or read it to its end.

        Raises ImageError, RequestError, ContextFullError, BusyError, BackendError, Aborted.
        """
        return self.answer(self.check_request({**options, "messages": messages, "stream": stream}))

    def check_request(self, body: Mapping[str, Any]) -> ChatRequest:
        """A request for `answer`, with the model's own options where it says nothing; see
        `ChatRequest.checked`."""
        return ChatRequest.checked(body, self._defaults.options)

    def answer(self, request: ChatRequest) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """The answer to a checked request: `create_chat_completion` in two steps."""
        replies = self.replies(request.messages, n=request.n, options=request.options)
        tools = request.options.prompt.tools
        if request.stream:
            return Pieces(
                completions.chunks(
                    replies, self._model_name, tools=tools, include_usage=request.include_usage
                )
            )
        return completions.completion(replies, self._model_name, tools=tools)
