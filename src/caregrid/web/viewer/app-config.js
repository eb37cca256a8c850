// The viewer's settings, filled in when this is served; every address is on our own origin.
window.PUBLIC_URL = '__PATH__/';
window.browserImportFunction = moduleId => import(moduleId);

window.config = {
  name: 'caregrid',
  routerBasename: '__PATH__',
  extensions: [],
  modes: [],
  // No guided tour over the first study a clinician opens.
  customizationService: [{ 'ohif.tours': { $set: [] } }],
  showStudyList: true,
  maxNumberOfWebWorkers: 3,
  showWarningMessageForCrossOrigin: false,
  showCPUFallbackMessage: true,
  showLoadingIndicator: true,
  strictZSpacingForVolumeViewport: true,
  groupEnabledModesFirst: true,
  // A segmentation is put over its images at once instead of asking first.
  disableConfirmationPrompts: true,
  showErrorDetails: 'production',
  maxNumRequests: { interaction: 100, thumbnail: 20, prefetch: 10 },
  defaultDataSourceName: 'caregrid',
  dataSources: [
    {
      namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
      sourceName: 'caregrid',
      configuration: {
        friendlyName: 'caregrid',
        name: 'caregrid',
        qidoRoot: '__DICOMWEB__',
        wadoRoot: '__DICOMWEB__',
        wadoUriRoot: '__DICOMWEB__',
        qidoSupportsIncludeField: true,
        supportsReject: false,
        supportsStow: false,
        dicomUploadEnabled: false,
        imageRendering: 'wadors',
        thumbnailRendering: 'wadors',
        enableStudyLazyLoad: true,
        supportsFuzzyMatching: false,
        supportsWildcard: true,
        staticWado: false,
        singlepart: 'bulkdata',
        bulkDataURI: { enabled: true, relativeResolution: 'studies' },
        omitQuotationForMultipartRequest: false,
      },
    },
  ],
  httpErrorHandler: error => {
    if (error.status === 401) {
      const here = window.location.pathname + window.location.search;
      window.location.assign('/login?next=' + encodeURIComponent(here));
    }
  },
};
