import sys

import pytest
import torch

from dipole.errors import DipoleError, MissingExtraError
from dipole.networks import TextConfig

SENTENCES = ["push the T to the goal", "open the door", "a", "Pick up the red cube and place it in the drawer."]


def make(**options):
    torch.manual_seed(0)
    return TextConfig(**options).build()


def test_ngrams_one_vector_per_sentence():
    encoder = make(width=16)
    together = encoder(SENTENCES)
    assert together.shape == (4, 16) == (4, encoder.out_dim)
    for i, sentence in enumerate(SENTENCES):
        # The products of batches of different sizes round differently.
        torch.testing.assert_close(encoder([sentence])[0], together[i], atol=1e-6, rtol=1e-5)
    assert torch.pdist(together).amin() > 1e-3


def test_ngrams_of_a_word_written_out():
    import zlib

    pieces = ["<ab", "<ab>", "ab>"]
    assert make(ngrams=(3, 5), buckets=101).tokens("ab") == [zlib.crc32(p.encode()) % 101 for p in pieces]


def test_ngrams_ignore_case_and_punctuation():
    encoder = make()
    assert torch.equal(encoder(["Open the door!"]), encoder(["open  the door"]))
    assert not torch.equal(encoder(["open the door"]), encoder(["open the drawer"]))


def test_similar_words_share_ngrams():
    encoder = make()
    drawer, drawers, window = (set(encoder.tokens(word)) for word in ("drawer", "drawers", "window"))
    assert len(drawer & drawers) > len(drawer) / 2
    assert len(drawer & window) < len(drawer) / 4


def test_ngrams_of_nothing():
    encoder = make()
    nothing = encoder(["", "open", "..."])
    assert torch.isfinite(nothing).all()
    torch.testing.assert_close(nothing[0], nothing[2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(encoder([""])[0], nothing[0], atol=1e-6, rtol=1e-5)


def test_ngrams_are_trainable():
    encoder = make(width=8, buckets=64)
    encoder(SENTENCES).square().sum().backward()
    assert [key for key, p in encoder.named_parameters() if p.grad is None or not bool((p.grad != 0).any())] == []


def test_unknown_encoder():
    with pytest.raises(DipoleError, match="did you mean 'ngram'"):
        TextConfig(name="ngrams").build()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A two-layer BERT with random weights, saved as published models are."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    words = sorted({word for sentence in SENTENCES for word in sentence.lower().strip(".").split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def test_sentences_are_the_mean_over_their_tokens(tiny_model):
    """Padding of the batch does not enter: each row equals its sentence alone, averaged by hand."""
    transformers = pytest.importorskip("transformers")
    encoder = make(name="transformer", model=tiny_model)
    together = encoder(SENTENCES)
    assert together.shape == (4, encoder.out_dim) == (4, 16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    network = transformers.AutoModel.from_pretrained(tiny_model).eval()
    for i, sentence in enumerate(SENTENCES):
        with torch.no_grad():
            hidden = network(**tokenizer([sentence], return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(0)
        # float32 attention over rows of different lengths.
        torch.testing.assert_close(together[i], mean / mean.norm(), atol=1e-5, rtol=0)
    assert torch.pdist(together).amin() > 1e-3


def test_sentence_embeddings_are_remembered_and_carry_no_weights(tiny_model):
    encoder = make(name="transformer", model=tiny_model)
    first = encoder(["open the door"])
    encoder._embed = None  # a second computation would fail
    assert torch.equal(encoder(["open the door", "open the door"]), first.expand(2, -1))
    assert encoder.state_dict() == {}
    assert list(encoder.parameters()) == []
    assert not first.requires_grad


def test_missing_model_and_missing_package(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    with pytest.raises(DipoleError, match="cannot be loaded .* or use 'ngram'"):
        make(name="transformer", model=str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"dipole\[generators\]"):
        make(name="transformer", model=str(tmp_path / "nothing either"))
