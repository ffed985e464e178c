"""Train the miniature's tokenizer on the captions: the stage `tokenizer` of `build.py`."""

import json

from d2f_fast.miniature import MINIATURE, emoji

VOCABULARY = 2000
START, END = "<|startoftext|>", "<|endoftext|>"


def all_captions() -> list[str]:
    """Return every caption of the training: each name without a colour, then on each background; last the empty one."""
    colours = (None, *range(len(emoji.BACKGROUNDS)))
    return [emoji.caption(name, colour) for name in range(len(emoji.names())) for colour in colours] + [""]


def build_tokenizer() -> None:
    """Train a byte-level BPE on the captions, and save it in CLIP's file format.

    The vocabulary holds every byte, so that any text can be encoded.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(all_captions(), trainer)
    tokens = [*alphabet, *(f"{character}</w>" for character in alphabet)]
    learned = json.loads(trained.to_str())["model"]["merges"][: VOCABULARY - len(tokens) - 2]
    merges = [tuple(merge) for merge in learned]
    tokens += [first + second for first, second in merges] + [START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    longest = max(map(len, CLIPTokenizer(vocab=vocabulary, merges=merges)(all_captions()).input_ids))
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=longest)
    folder = MINIATURE / "tokenizer"
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    # vocab.json and merges.txt hold the same, and are the files that Stable Diffusion 1.5 ships.
    (folder / "tokenizer.json").unlink()
    print(f"{len(vocabulary)} tokens, captions of at most {longest} tokens")
