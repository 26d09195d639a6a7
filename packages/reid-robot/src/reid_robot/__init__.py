"""Person re-identification in real time on small machines, and what each attention block costs."""
