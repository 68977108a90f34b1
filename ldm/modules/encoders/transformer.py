"""Text encoders that are trained with the diffusion: tokens through a transformer (interface and state-dict keys:
latent-diffusion, ldm/modules/encoders/modules.py)."""

from collections.abc import Sequence

import torch

from ldm.checkpoint import is_weightless
from ldm.modules.encoders.base import AbstractEncoder, import_transformers, reading
from ldm.modules.x_transformer import Encoder, TransformerWrapper


class TransformerEmbedder(AbstractEncoder):
    """Tokens int64 [B, S] -> [B, S, n_embed], by n_layer layers. device is accepted and has no effect: the encoder
    runs where its weights are."""

    def __init__(self, n_embed, n_layer, vocab_size, max_seq_len=77, device="cuda", embedding_dropout=0.0):
        super().__init__()
        layers = Encoder(dim=n_embed, depth=n_layer)
        self.transformer = TransformerWrapper(
            num_tokens=vocab_size, max_seq_len=max_seq_len, attn_layers=layers, emb_dropout=embedding_dropout
        )

    def forward(self, tokens):
        tokens = tokens.to(self.transformer.token_emb.weight.device)
        return self.transformer(tokens, return_embeddings=True)


class BERTTokenizer(AbstractEncoder):
    """Captions -> tokens int64 [B, max_length] of BERT's vocabulary: begin, text (cut where too long), end, padding.

    vq_interface: `encode` returns (None, None, [None, None, tokens]), as a first stage would; version: a folder or
    hub name. UserFileError if it is not there.
    """

    def __init__(self, device="cuda", vq_interface=True, max_length=77, version="bert-base-uncased"):
        super().__init__()
        self.vq_interface, self.max_length = vq_interface, max_length
        self.tokenizer = None  # without weights there is nothing to read
        if not is_weightless():
            transformers = import_transformers("BERT's tokenizer")
            with reading(version, "tokenizer"):
                self.tokenizer = transformers.BertTokenizerFast.from_pretrained(version)

    def forward(self, text: str | Sequence[str]) -> torch.Tensor:
        text = [text] if isinstance(text, str) else list(text)
        options = dict(truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt")
        return self.tokenizer(text, **options)["input_ids"]

    def encode(self, text):
        """The tokens; see vq_interface."""
        tokens = self(text)
        return (None, None, [None, None, tokens]) if self.vq_interface else tokens

    def decode(self, text):
        """`text` itself."""
        return text


class BERTEmbedder(TransformerEmbedder):
    """Captions (or with use_tokenizer off tokens) -> [B, max_seq_len, n_embed], as in text2img-1p4B.

    tokenizer: see BERTTokenizer's version; other arguments as in TransformerEmbedder.
    """

    null = ""  # what guidance leads away from

    def __init__(
        self,
        n_embed,
        n_layer,
        vocab_size=30522,
        max_seq_len=77,
        device="cuda",
        use_tokenizer=True,
        embedding_dropout=0.0,
        tokenizer="bert-base-uncased",
    ):
        super().__init__(n_embed, n_layer, vocab_size, max_seq_len, device, embedding_dropout)
        self.use_tknz_fn = use_tokenizer
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(vq_interface=False, max_length=max_seq_len, version=tokenizer)
        else:
            self.null = None

    def forward(self, text):
        return super().forward(self.tknz_fn(text) if self.use_tknz_fn else text)
