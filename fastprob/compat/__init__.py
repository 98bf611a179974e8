"""The names and signatures of the released code of ProbVLM and DAPT, over ours."""
