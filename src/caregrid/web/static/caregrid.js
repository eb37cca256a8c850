// Progressive enhancement only: every page works without this file.
import { initAll } from './nhsuk/nhsuk-frontend.min.js'

document.body.classList.add('js-enabled')
if ('noModule' in HTMLScriptElement.prototype) document.body.classList.add('nhsuk-frontend-supported')
initAll()

// Fields that belong to one answer are shown with that answer only.
for (const part of document.querySelectorAll('[data-cg-shown-by]')) {
  const radios = part.closest('form').querySelectorAll(`input[name="${part.dataset.cgShownBy}"]`)
  const show = () => {
    part.hidden = ![...radios].some((radio) => radio.checked && radio.value === part.dataset.cgShownFor)
  }
  for (const radio of radios) radio.addEventListener('change', show)
  show()
}
