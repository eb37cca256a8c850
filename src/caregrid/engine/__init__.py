"""From arrival to delivered, decided finding."""
