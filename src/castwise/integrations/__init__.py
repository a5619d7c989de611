"""Integrations: the same policy file in loops that castwise does not own.

    lightning.py      a precision plugin for Trainer and Fabric
    huggingface.py    a callback for transformers.Trainer, and a call for Accelerate
    grad_scaler.py    a stand-in for torch.amp.GradScaler
    hosted.py         what both share: a policy on a model in somebody else's loop

Nothing is imported here: each room needs its own optional package.
"""
