"""What lets a vLLM server follow a policy that trains: see docs/sampling.md of trlx."""
