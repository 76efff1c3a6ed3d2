"""Fields of a model's config.json that decide no token, whichever engine draws.

Trainers write them as they like, and a checkpoint that differs in nothing else is of the same model.
"""

from __future__ import annotations

WITHOUT_EFFECT = frozenset(
    {
        *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "name_or_path", "_name_or_path"),
        *("_attn_implementation", "_attn_implementation_autoset", "output_hidden_states", "output_attentions"),
        *("return_dict", "use_cache", "chunk_size_feed_forward", "is_encoder_decoder", "gradient_checkpointing"),
        *("id2label", "label2id", "num_labels", "problem_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        *("initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop"),
        *("router_jitter_noise", "router_aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha", "seq_aux"),
        *("output_router_logits", "num_nextn_predict_layers"),
    }
)
"""Of training, of other tasks, of who loads the file.  The control tokens' ids come from the tokenizer and the request;
of MTP see docs/adr/0025."""
