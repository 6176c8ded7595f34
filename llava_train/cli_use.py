"""The part of the `llava-train` command that uses trained models: ask, chat, export, evaluate, lmms-eval, demo."""
