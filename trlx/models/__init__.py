"""The Hugging Face side: where a model keeps its parts, the heads beside it, and the policy made of both."""
