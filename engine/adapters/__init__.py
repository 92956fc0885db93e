"""Athanor's parts inside other people's trainers, in two lines each.  Every host is imported when its adapter is used, never by this package.

transformers    patch(model): norms, RoPE, SwiGLU and the lm_head loss of Llama, Qwen2 and Qwen3 models
shared_decoder  shared_decoder(model): our Generator on the weights of such a model, where they are
trl             AthanorGRPOTrainer: TRL's GRPOTrainer with our log-probs, losses and Generator
verl            register_losses(), compute_score(): our losses and verifiers in verl's registries
"""
