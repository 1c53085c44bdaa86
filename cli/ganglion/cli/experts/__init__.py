"""`experts …`: whole models side by side, what their answers may cost, and which of them are chosen."""
