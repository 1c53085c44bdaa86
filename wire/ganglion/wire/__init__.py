"""What any two processes need to talk: nouns, errors, limits, identity, enrolment tokens, sealed lanes, discovery."""
