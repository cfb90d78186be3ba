"""Human feedback: pairs of answers that people rank, their verdicts, and how far people agree.

Read `preferences` first: it holds the record of a verdict and the file that they are appended to.
`pairs` stores what is shown, `ranking` says what a person is shown next, `agreement` measures
whether people see the same.
"""
