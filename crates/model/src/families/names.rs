//! Tensor names, in GGUF and in safetensors.

use crate::checkpoint::Checkpoint;
use crate::spec::TensorNames;

/// The names that a checkpoint uses.
pub(super) fn of(checkpoint: &Checkpoint, is_gguf: bool, sandwich: bool) -> TensorNames {
    if is_gguf {
        let block = |name: &str| format!("blk.{{i}}.{name}.weight");
        return TensorNames {
            embed: "token_embd.weight".to_owned(),
            final_norm: "output_norm.weight".to_owned(),
            head: "output.weight".to_owned(),
            attn_norm: block("attn_norm"),
            q: block("attn_q"),
            k: block("attn_k"),
            v: block("attn_v"),
            qkv: block("attn_qkv"),
            o: block("attn_output"),
            post_attn_norm: block("post_attention_norm"),
            q_norm: block("attn_q_norm"),
            k_norm: block("attn_k_norm"),
            mlp_norm: block("ffn_norm"),
            gate: block("ffn_gate"),
            up: block("ffn_up"),
            gate_up: block("ffn_up"),
            down: block("ffn_down"),
            post_mlp_norm: block("post_ffw_norm"),
        };
    }
    // A language model inside a multimodal one has a prefix.
    let prefix = ["", "language_model.", "model.language_model."]
        .into_iter()
        .find(|p| checkpoint.has(&format!("{p}model.embed_tokens.weight")))
        .unwrap_or("");
    let block = |name: &str| format!("{prefix}model.layers.{{i}}.{name}.weight");
    let (post_attn, mlp) = if sandwich {
        ("post_attention_layernorm", "pre_feedforward_layernorm")
    } else {
        ("\0", "post_attention_layernorm")
    };
    TensorNames {
        embed: format!("{prefix}model.embed_tokens.weight"),
        final_norm: format!("{prefix}model.norm.weight"),
        head: format!("{prefix}lm_head.weight"),
        attn_norm: block("input_layernorm"),
        q: block("self_attn.q_proj"),
        k: block("self_attn.k_proj"),
        v: block("self_attn.v_proj"),
        qkv: block("self_attn.qkv_proj"),
        o: block("self_attn.o_proj"),
        post_attn_norm: block(post_attn),
        q_norm: block("self_attn.q_norm"),
        k_norm: block("self_attn.k_norm"),
        mlp_norm: block(mlp),
        gate: block("mlp.gate_proj"),
        up: block("mlp.up_proj"),
        gate_up: block("mlp.gate_up_proj"),
        down: block("mlp.down_proj"),
        post_mlp_norm: block("post_feedforward_layernorm"),
    }
}
