"""How are factors computed? Each method that needs more than one closed form has a solver here; numpy in and out."""
