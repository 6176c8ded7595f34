"""`llava-train doctor`: what this machine and this Python can do, and what is wrong. Imports no torch itself."""
