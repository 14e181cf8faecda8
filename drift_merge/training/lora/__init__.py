"""Projects a delta on the factors of LoRA, rsLoRA and DoRA, as PEFT trains them.

Must not know priors, rules or gradients: one delta goes in, a direction per factor comes out.

Read: projection, layers, directions.
"""
