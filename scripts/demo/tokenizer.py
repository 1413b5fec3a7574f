"""The demo model's own small vocabulary: byte-level BPE with the Llama 3 pre-tokenizer and special tokens."""

from __future__ import annotations

from pathlib import Path

from icons import THINGS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024  # <|image|> is the token after the last, with an embedding and no logit
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|reserved_special_token_2|>",
]
# The messages of the Llama 3.2 Vision template; a system header appears only when a system message is given.
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' or part['type'] == 'image_url' %}
                {{- '<|image|>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

TALK = """What is in this picture? What is in this image? What do you see? What is this? Caption: Caption this image.
Describe this image. Describe this image in one sentence. Describe the picture. Describe the image in detail. Please.
What colour is it? What color is the thing on the left? How many things are there? There is one thing. There are two.
Is there a cat in the picture? Yes. No. Where is it? Answer in JSON. Answer with one word. Tell me about the images.
You are a helpful assistant. Hello! How are you? Thank you. Which thing is on the right? Which is below? Compare them.
user assistant system {"caption": "a red apple", "colour": "red"} 0 1 2 3 4 5 6 7 8 9 10 12 20 50 100 123 2024"""  # noqa: E501


def build() -> PreTrainedTokenizerFast:
    """Train the merges on captions and ordinary prompts; always the same result."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    phrases = [t.phrase(c) for t in THINGS for c in (t.colours or (None,))]
    text = [f"{p} to the left of {q}\n{q} above {p}" for p, q in zip(phrases, reversed(phrases), strict=True)]
    text += [f"It is {p}." for p in phrases] * 3 + TALK.split("\n") * 40
    text += ["assistant", "\n\n"] * 40
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    filler = VOCAB_SIZE - len(SPECIAL) - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(SPECIAL + [f"<|reserved_special_token_{3 + i}|>" for i in range(filler)])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.add_special_tokens(["<|image|>"])
    assert tokenizer.token_to_id("<|image|>") == VOCAB_SIZE
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A",
                pair=f"{begin} $A {begin}:1 $B:1",
                special_tokens=[(begin, tokenizer.token_to_id(begin))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=131072,
    )


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """One image and a prompt, up to where the reply starts."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


if __name__ == "__main__":
    made = build()
    made.save_pretrained(Path("/tmp/demo-tokenizer"))
    for sample in ("a red apple to the left of a black cat", "the digit seven above an orange heart"):
        print(made.tokenize(sample))
    print(len(made), made.convert_ids_to_tokens(prompt_ids(made, "Describe this image.")))
