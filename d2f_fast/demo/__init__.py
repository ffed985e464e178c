"""`d2f demo`: the method on the embedded miniature, beside naive flow matching and diffusion finetuning, measured.

`run` trains and draws, `sampling` holds the samplers, `exam` the measurements, `reading` says in words what they say,
`report` and `plots` show it.
"""
