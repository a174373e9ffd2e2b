"""The byte-level tokenizer of the bench: one token a byte, so nothing has to be learnt or downloaded.

    ids 0..255   the byte itself        256 <pad>   257 <bos>   258 <eos>   259..263 reserved

Every data format ends in the same tokens, `<bos>{question}\\n= {answer}<eos>`: the chat template writes all
of them; on plain text the tokenizer writes <bos> and the trainer (TRL, or `data.collate`) writes <eos>.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets"
SPECIALS = ("<pad>", "<bos>", "<eos>", *(f"<reserved_{i}>" for i in range(5)))
PAD, BOS, EOS = 256, 257, 258
VOCABULARY_SIZE = 256 + len(SPECIALS)
ANSWER = "\n= "

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '\\n= ' -}}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n= ' -}}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer from nothing; the shipped files are this one saved."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(SPECIALS[3:]),
        padding_side="right",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Load the tokenizer that ships with the base."""
    return PreTrainedTokenizerFast.from_pretrained(ASSETS)


def _byte_symbols() -> list[str]:
    """The printable character by which ByteLevel writes each byte: itself, or the next one from 256 up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unused = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(unused)) for byte in range(256)]
