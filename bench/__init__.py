"""The measuring bench: what Millstream costs, as ratios against what an average team would write.

`python -m bench` runs baseline and product side by side on one machine and prints the table of budgets. It needs Linux
(it reads /proc and pins processes) and a C compiler (its upstream serves more chunks than Python could).
"""
